"""What can be chosen by name, from the registries where each choice is defined."""


def kinds() -> dict[str, dict[str, str]]:
    """Kind → name → one line on it."""
    from stages.engines import engines
    from stages.evaluation.benchmarks import benchmarks
    from stages.labelling.personas import personas
    from stages.lora.importance.scorers import scorers
    from stages.lora.importance.strategies import strategies
    from stages.rewards.builtin import rewards

    return {
        "scorers": scorers.describe(),
        "strategies": strategies.describe(),
        "rewards": rewards.describe(),
        "benchmarks": benchmarks.describe(),
        "engines": engines.describe(),
        "personas": personas.describe(),
    }
