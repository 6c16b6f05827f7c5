"""The package name of document 004: its snippets run with this folder's parent on sys.path."""
