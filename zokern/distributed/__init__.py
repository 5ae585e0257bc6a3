"""More than one process: tensors that are shared out over ranks, and what ranks tell each other."""
