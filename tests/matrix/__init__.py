"""What pyproject.toml promises of Pythons and libraries, tried."""
