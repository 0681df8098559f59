"""Mistakes to put into lorapar, each of which leaves something on a wrong device."""

from importlib.machinery import SourceFileLoader

FAULTS = {
    "a batch of votes": ("engines.in_process", "(prompts, self.model.device)", '(prompts, "cpu")'),
    "columns of the cache": ("engines.kv_cache", "(self.length, device=positions.device)", "(self.length)"),
    "positions of new tokens":
        ("engines.continuous_batching", "(values, device=self.model.device)", "(values)"),
    "draws of the sampler":
        ("engines.continuous_batching", "=torch.float64, device=logits.device)", "=torch.float64)"),
    "the index of a sparse layer":
        ("lora.adapter.elements", "mask.to(self._dense.device).flatten()", "mask.cpu().flatten()"),
    "weights of rewards": ("lora.grpo.zero_signal", "weights.to(rewards.device)", "weights.cpu()"),
    "targets of a packed batch":
        ("packing.batch", "return torch.tensor(values, device=device)", "return torch.tensor(values)"),
    "a digest of device memory":
        ("lora.training.loop", "weight.detach().cpu().contiguous()", "weight.detach().contiguous()"),
    "a generator of the CPU for weights of the device":
        ("lora.adapter.adapter", "randn(shape, generator=gen", 'randn(shape, device="cuda", generator=gen'),
    "always the first card": ("models.base", '"cuda", torch.cuda.current_device())', '"cuda", 0)'),
}  # fmt: skip
"""Mistake → module below `stages`, right text, wrong text."""
IN_TWO_PROCESSES = {"a digest of device memory", "always the first card"}
"""Mistakes of code that runs, or goes wrong, with several processes alone."""


def put_in(name: str) -> None:
    """Change the source of a module when it is imported; SystemExit if it has no such text."""
    module, right, wrong = FAULTS[name]
    usual = SourceFileLoader.get_code

    def get_code(self, fullname):
        if fullname != f"stages.{module}":
            return usual(self, fullname)
        text = self.get_source(fullname)
        if text.count(right) != 1:
            raise SystemExit(f"{fullname} has {right!r} not once: choose another mistake")
        return self.source_to_code(text.replace(right, wrong).encode(), self.path)

    SourceFileLoader.get_code = get_code
