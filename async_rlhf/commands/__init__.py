"""What the subcommands do; `cli` only parses and calls them."""
