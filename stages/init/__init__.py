"""The first config for a file of rows: what is in the file, and the settings that fit it."""
