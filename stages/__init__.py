"""The lorapar library: six stages, what runs them, and what they share. Nothing here talks to a terminal."""
