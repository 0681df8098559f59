"""Everything that is text: prompts, answers, rewards, votes."""
