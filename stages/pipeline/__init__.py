"""From the stage table to artifacts: steps, keys, states, one step's run."""
