"""Prints name, version and licence of every package that is installed (`make licences`)."""

from importlib.metadata import distributions

for package in sorted(distributions(), key=lambda each: each.name.lower()):
    fields = package.metadata
    kinds = [text for text in fields.get_all("Classifier", []) if text.startswith("License ::")]
    text = fields["License-Expression"] or ", ".join(kinds) or fields["License"] or "not said"
    print(f"{package.name} {package.version}: {text.splitlines()[0].replace('License :: ', '')}")
