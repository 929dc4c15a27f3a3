"""Pictures, tables and pages of the documentation that are made from records and from the code, by one command."""
