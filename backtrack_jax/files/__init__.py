"""The ground floor: files that are whole or absent, tables, paths, the console."""
