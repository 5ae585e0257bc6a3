"""What mkdocs.yml asks for when the site is built, a hook a file; nothing of it is published."""
