"""The lorapar library: six stages, their plumbing and the concepts they share. Nothing here talks to a terminal."""
