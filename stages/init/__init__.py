"""`lorapar init`: a profile of a file of rows, and a first config that fits it."""
