"""The pages, and what makes their tables from the code."""
