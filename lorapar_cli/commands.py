"""All commands with a one-line description, in groups.

Imports nothing heavy, so that `lorapar --help` takes 23 ms; importing every command takes 430 ms.
"""

import textwrap

from stages import ORDER, about

ABOUT = "LoRA-PAR: split LoRA elements and data into System 1 and System 2, and train each apart."
GROUPS = {
    "From your rows to a served model": {
        "init": "Read your rows and write a config that fits them and the model; or copy an example.",
        "plan": "Show what a run would do; estimate time and memory of each step from short measurements.",
        "run": "Run every stage that is missing or stale.",
        "ask": "Ask a trained model a question in each of its modes, in this process.",
        "report": "Write a page on a run, two side by side, or tables with intervals and published values.",
        "export": "Export a trained adapter, or the merged model, with a model card.",
        "serve": "Serve a trained model, in all of its modes, by vLLM.",
    },
    "One stage": {name: about(name) for name in ORDER},
    "Look": {
        "status": "Show which artifacts are current, and why the others are not.",
        "show": "Show an artifact's manifest, graded samples, or the table of results.",
        "list": "List what can be chosen by name: scorers, strategies, rewards and so on.",
        "config": "Print every setting with its default and meaning.",
        "doctor": "Check this machine: versions, device, number types, engines and sandboxes.",
    },
    "More": {
        "sweep": "Run the missing steps of tables of many runs; steps that cells share run once.",
        "demo-data": "Write the demonstration data set.",
        "fetch": "Fetch a small model without the Hugging Face hub.",
    },
}
"""Commands by what they are for, in the order of `lorapar --help`, each with a line."""
COMMANDS = {name: text for commands in GROUPS.values() for name, text in commands.items()}


def usage() -> str:
    """Return the text of `lorapar --help`."""
    lines = ["Usage: lorapar COMMAND …   (lorapar COMMAND --help says more)", "", ABOUT]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:"]
        for name, text in commands.items():
            head = f"  {name:<11}"
            lines += textwrap.wrap(text, 100, initial_indent=head, subsequent_indent=" " * len(head))
    lines += ["", "--version; --install-completion for your shell. Guide: docs/, or make docs"]
    return "\n".join(lines)
