"""One adapter for every init, and prompt tuning and its kin, without scores and masks.

Plain PEFT on the plain base model gives the same logits, and the base is never changed.
"""

import pytest
import torch
from conftest import ROOT, flags, make_step
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from stages.config import LoraSection, ModelSection
from stages.engines import Sampling
from stages.engines.continuous_batching import generate
from stages.engines.in_process import InProcess
from stages.errors import ArtifactError, ConfigError
from stages.lora.adapter import adapter, baselines
from stages.lora.adapter.merge import MergedCopy, adapted_weights, merged_parameters
from stages.lora.adapter.shared_cast import SharedCast
from stages.models import cancellation
from stages.models.base import load_adapted, load_base
from stages.models.tokenizer import load_tokenizer
from stages.pipeline.resolve import resolved
from stages.pipeline.steps import plan_steps


def base(tiny, dtype="float32"):
    return load_base(ModelSection(name=str(tiny), dtype=dtype))


def base_weights(adapted) -> dict[str, torch.Tensor]:
    """The weights of a model to which PEFT has added an adapter, by the names that they had before."""
    return {n.replace(".base_layer", ""): p for n, p in adapted.named_parameters() if ".lora_" not in n}


def logits(model) -> torch.Tensor:
    ids = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


@pytest.mark.parametrize("init", ["normal", "pissa", "olora", "default"])
def test_an_adapter_starts_as_the_base_leaves_it_as_it_was_and_loads_in_plain_peft(tiny, tmp_path, init):
    """PEFT subtracts what some inits give from the weights of the base."""
    lora = LoraSection(r=4, lora_alpha=8, init=init)
    plain, changed = base(tiny), base(tiny)
    model = adapter.initial(changed, lora, 0)
    assert init == "normal" or float((logits(model) - logits(plain)).abs().max()) < 1e-5
    before, after = dict(plain.named_parameters()), base_weights(changed)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():  # as if trained: the first half of a compensated adapter moves
        for name, layer in adapter.lora_layers(model).items():
            adapter.trainable_part(name, layer.weight, lora).add_(0.01)
    adapter.save(model, tmp_path / "a", ModelSection(name=str(tiny)))
    peft = PeftModel.from_pretrained(plain, str(tmp_path / "a"))
    torch.testing.assert_close(logits(peft), logits(model), rtol=0, atol=0)
    again = adapter.attach(base(tiny), lora, tmp_path / "a")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    served = cancellation.rewrite(tmp_path / "a", tmp_path / "served")  # a copy where weights cancel
    assert (served == tmp_path / "a") == (init in ("normal", "default"))


def test_pissa_trains_as_pissa_on_the_residual(tiny):
    """Base − s·B₀A₀ + s·BA, PEFT's own form, against [A; A₀], [B, −B₀] on the unchanged base."""
    lora = LoraSection(r=4, lora_alpha=8, init="pissa")
    ours = adapter.initial(base(tiny), lora, 0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=lora.target_modules, init_lora_weights="pissa")
    theirs = get_peft_model(base(tiny), config).eval()
    with torch.no_grad():
        for name, layer in adapter.lora_layers(theirs).items():
            layer.weight.add_(0.01)
            adapter.trainable_part(name, adapter.lora_layers(ours)[name].weight, lora).copy_(layer.weight)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


def test_a_merged_copy_answers_alike_and_the_base_is_untouched(tiny):
    plain = base(tiny, "bfloat16")
    before = {n: p.clone() for n, p in plain.named_parameters()}
    copy = MergedCopy(plain)
    model = adapter.initial(plain, LoraSection(r=4, lora_alpha=8), 0)
    for _ in range(3):
        merged = copy.refresh(model)
    assert float((logits(merged) - logits(model)).abs().max()) < 0.1
    for name, layer in adapted_weights(model).items():  # the sum is rounded, and not its terms
        weight = layer.base_layer.weight.float() + layer.get_delta_weight("default")
        assert torch.equal(merged.get_parameter(name), weight.to(plain.dtype))
    sent = dict(merged_parameters(model))  # what vLLM gets
    assert sent.keys() == before.keys()
    assert all(torch.equal(value, merged.get_parameter(name)) for name, value in sent.items())
    after = base_weights(model.get_base_model())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_all_linear_modules_are_those_of_peft(tiny, tmp_path):
    lora = LoraSection(r=4, target_modules="all-linear", init="pissa")
    model = adapter.initial(base(tiny), lora, 0)
    theirs = get_peft_model(base(tiny), LoraConfig(r=4, target_modules="all-linear"))
    assert adapter.lora_layers(model).keys() == adapter.lora_layers(theirs).keys()
    assert "o_proj" in str(adapter.lora_layers(model).keys())
    adapter.save(model, tmp_path / "a", ModelSection(name=str(tiny)))
    again = load_adapted(ModelSection(name=str(tiny), dtype="float32"), tmp_path / "a")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)


def test_the_base_s_revision_is_named_and_no_hub_is_asked(tiny, tmp_path, monkeypatch):
    """PEFT's own loaders take main otherwise."""
    model, asked = adapter.initial(base(tiny), LoraSection(), 0), "check_file_exists_on_hf_hub"
    monkeypatch.setattr(f"peft.utils.save_and_load.{asked}", lambda *_: pytest.fail("asked"))
    for name, revision, kept in (("a/b", "0" * 40, "0" * 40), ("a/b", "main", None), (str(tiny), "x", None)):
        adapter.save(model, tmp_path, ModelSection(name=name, revision=revision))
        config = PeftConfig.from_pretrained(str(tmp_path))
        assert (config.base_model_name_or_path, config.revision) == (name, kept)


def test_ranks_and_modules_that_do_not_fit_are_refused(tiny, tmp_path):
    for init in ("pissa", "olora"):
        lora = LoraSection(r=64, init=init, target_modules=["q_proj", "k_proj"])
        with pytest.raises(ConfigError, match=f"lora.r 64: init {init} gives .*k_proj.* 32 at most"):
            adapter.initial(base(tiny), lora, 0)
    adapter.save(adapter.initial(base(tiny), LoraSection(r=4), 0), tmp_path / "a", ModelSection(name="x"))
    with pytest.raises(ArtifactError, match=r"does not fit the model: .* is \(4, 64\), expected \(8, 64\)"):
        adapter.attach(base(tiny), LoraSection(r=8), tmp_path / "a")
    with pytest.raises(ArtifactError, match="is on one side only"):
        adapter.attach(base(tiny), LoraSection(r=4, target_modules=["q_proj"]), tmp_path / "a")


def test_layers_that_read_one_input_share_one_cast_of_it(tiny, monkeypatch):
    """Of a layer in 16 bits: one of q, k, v, one of gate and up, one of down. The results are PEFT's."""
    names = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    casts, usual, results = [], SharedCast.__call__, []
    monkeypatch.setattr(SharedCast, "__call__", lambda *given: casts.append(usual(*given)) or casts[-1])
    monkeypatch.setattr(adapter, "STD", 0.3)
    for shares in (True, False):
        model = adapter.initial(base(tiny, "bfloat16"), LoraSection(r=4, target_modules=names), 0)
        for module in model.modules() if not shares else ():
            vars(module).pop("_cast_input_dtype", None)
        weights = [layer.weight.requires_grad_(True) for layer in adapter.lora_layers(model.train()).values()]
        output = model(input_ids=torch.arange(3, 40).view(1, -1)).logits
        slopes = torch.autograd.grad(output.float().square().sum(), weights)
        results.append((output, torch.cat([slope.flatten() for slope in slopes])))
    number, ((shared, slope), (plain, plain_slope)) = model.config.num_hidden_layers, results
    assert len(casts) == 6 * number and len(set(map(id, casts))) == 3 * number
    assert torch.equal(shared, plain)
    assert (slope - plain_slope).norm() < 0.05 * slope.norm()  # sums are rounded once, not three times


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_small_update_of_a_compensated_adapter_survives_16_bits(tiny, tmp_path, init):
    lora = LoraSection(r=4, init=init)
    model = adapter.initial(base(tiny), lora, 0)
    with torch.no_grad():
        for name, layer in adapter.lora_layers(model).items():
            part = adapter.trainable_part(name, layer.weight, lora)
            part.add_(5e-4 * torch.randn(part.shape, generator=torch.Generator().manual_seed(len(name))))
    adapter.save(model, tmp_path / "a", ModelSection(name=str(tiny)))
    served = cancellation.rewrite(tmp_path / "a", tmp_path / "m")

    def update(folder, dtype):
        weights = {name: weight.to(dtype).double() for name, weight in adapter.read(folder).items()}
        names = [name for name in weights if ".lora_A." in name]
        return torch.cat([(weights[n.replace("_A.", "_B.")] @ weights[n]).flatten() for n in names])

    exact = update(tmp_path / "a", torch.float32)
    as_trained, as_served = (
        float((update(folder, torch.bfloat16) - exact).norm() / exact.norm())
        for folder in (tmp_path / "a", served)
    )
    assert float((update(served, torch.float32) - exact).norm() / exact.norm()) < 1e-5
    assert as_served < 0.005 < 0.05 < as_trained


def test_of_a_model_that_reads_images_the_language_model_alone_is_adapted():
    text = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    }  # fmt: skip
    vision = text | {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    lora = LoraSection(target_modules="all-linear")
    adapted = adapter.lora_layers(adapter.initial(Gemma3ForConditionalGeneration(config), lora, 0))
    assert len(adapted) == 2 * 7 and all("language_model" in name for name in adapted)


METHODS = ["ia3", "prompt_tuning", "p_tuning", "prefix_tuning"]
SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in METHODS[1:]]
COMMON = ["eval.targets=[base,sft,rl]", "sft.num_train_epochs=9"]


def chosen(begun, method: str, *more: str):
    return begun(f"baseline.method={method}", *COMMON, *more)


@pytest.mark.parametrize("method", ["ia3", *SLOW])
def test_sft_rl_and_eval_run(begun, method):
    """In 16 bits every second of them."""
    dtype = ("float32", "bfloat16")[METHODS.index(method) % 2]
    config = chosen(begun, method, f"model.dtype={dtype}")
    assert not {"score", "partition"} & set(plan_steps(resolved(config)))
    _, *made = [make_step(config, step) for step in ("classify", "sft", "rl", "eval:rl@demo")]
    for stage in made[:2]:
        summary = stage.manifest["summary"]
        assert summary["active_share"] == 1 and summary["moved"] > 0.9 * summary["elements"] > 0
    first, second = (load_file(artifact.path / "adapter" / baselines.STATE) for artifact in made[:2])
    assert first.keys() == second.keys() and any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_answers_like_what_was_trained(begun, method, tmp_path):
    """PEFT's own file on the plain base, against the parameters from which RL goes on."""
    config = chosen(begun, method)
    ids = torch.arange(5, 25)[None]
    made = baselines.attach(load_base(config.model), config.baseline, config.seed, None)
    for weight in adapter.trained_parameters(made).values():
        weight.data += 0.1 * torch.randn(weight.shape)
    adapter.save(made, tmp_path, config.model)
    baselines.save(made, tmp_path)
    base = load_base(config.model)
    trained = baselines.attach(base, config.baseline, config.seed, tmp_path).eval()
    plain = load_adapted(config.model, tmp_path)
    wanted = trained(ids).logits[:, -20:]
    assert torch.allclose(plain(ids).logits[:, -20:], wanted, atol=1e-6)
    assert float((load_base(config.model)(ids).logits - wanted).abs().max()) > 1e-3


def test_texts_after_a_trained_prompt_are_never_padded(begun):
    """Padding or a shared cache would part the two."""
    config = chosen(begun, "prefix_tuning")
    model = load_adapted(config.model, make_step(config, "sft").path / "adapter")
    prompts = [list(range(5, 60)), list(range(5, 50)), list(range(90, 95))]
    tokenizer = load_tokenizer(config.model)
    sampling = Sampling(4, (tokenizer.eos_token_id,))
    made = dict(generate(model, tokenizer, prompts, sampling))
    assert all(len(made[i].ids) == 4 for i in range(3))
    for i, ids in enumerate(prompts):
        assert dict(generate(model, tokenizer, [ids], sampling)) == {0: made[i]}
    with torch.no_grad():
        together = InProcess(model, tokenizer, 8)._last_logits(prompts)
        alone = torch.cat([model(torch.tensor([ids])).logits[:, -1] for ids in prompts])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_trained_prompt_cannot_be_merged(begun, lorapar, tmp_path):
    config = chosen(begun, "p_tuning")
    make_step(config, "sft")
    settings = flags(*begun.home, "baseline.method=p_tuning", *COMMON)
    export = ("export", ROOT / "configs/smoke.yaml", tmp_path / "out", "--target", "sft")
    done = lorapar(*export, *settings, "--merged")
    assert done.code == 78 and "p_tuning trains a prompt, which no weight can hold" in done.err
    done = lorapar(*export, *settings)
    assert done.code == 0, done.err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"README.md", adapter.ADAPTER, "adapter_config.json"}
    assert "after p_tuning\n" in (tmp_path / "out/README.md").read_text()
