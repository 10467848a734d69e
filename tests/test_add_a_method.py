"""docs/add-a-method.md is executed: its file and its line add a method to a copy of the package, which then has it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Attach, train, save and load; then the LightningModule, the commands, and a comparison.
SESSION = """
import json, sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from transformers import AutoModelForCausalLM

import lit_peft
from lit_peft.cli import main

def run():
    decoder, texts, place = sys.argv[1:]
    sys.argv = ["lit-peft"]
    assert lit_peft.__file__.startswith(place)

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(decoder)
    lit_peft.attach(model, lit_peft.FactorTuningSettings(target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = torch.randint(5, 20, (2, 8))
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    lit_peft.save_adapter(model, "adapter")
    loaded = lit_peft.load_adapter(AutoModelForCausalLM.from_pretrained(decoder), "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)

    module = lit_peft.FactorTuning(base=decoder, target_modules=["q_proj"])
    data = lit_peft.CausalLMData(base=decoder, train=texts, batch_size=8)
    pl.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False).fit(module, data)
    assert any((parameter != 1).any() for parameter in module.parameters() if parameter.requires_grad)

    fit = ["fit", "--model", "FactorTuning", "--model.base", decoder, "--model.target_modules", "[v_proj]"]
    fit += ["--data", "CausalLMData", "--data.train", texts, "--trainer.max_steps", "2", "--trainer.accelerator", "cpu"]
    assert main(fit) == 0
    config = json.loads(Path("lit_peft_runs/version_0/adapter/adapter_config.json").read_text())
    assert config["lit_peft_method"] == "factor_tuning" and config["settings"]["target_modules"] == ["v_proj"]
    assert main(["info", "lit_peft_runs/version_0/adapter"]) == 0
    assert main(["doctor", "--method", "FactorTuning", "--base", decoder]) == 0

    comparison = {
        "base": decoder, "task": "causal_lm", "steps": 2, "trials": 1, "seeds": 1, "evaluations": 1,
        "data": {"class_path": "CausalLMData", "init_args": {"train": texts}}, "trainer": {"accelerator": "cpu"},
    }
    Path("compare.yaml").write_text(json.dumps(comparison))
    assert main(["compare", "--config", "compare.yaml", "--methods", "FactorTuning,LoRA", "--output", "compared"]) == 0
    rows = [json.loads(line) for line in Path("compared/results.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["FactorTuning", "LoRA"] and not any("error" in row for row in rows)
    # One factor for each of the 32 and 16 outputs of query and value, in two layers.
    assert rows[0]["trainable"] == 2 * (32 + 16)

if __name__ == "__main__":
    run()
"""


def test_the_file_and_the_line_of_the_page_add_a_method(decoder: Path, reviews: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8")
    code, line = re.findall(r"```py\n(.*?)```", page, flags=re.DOTALL)
    ignore = shutil.ignore_patterns("__pycache__")
    package = tmp_path / "site" / "lit_peft"
    shutil.copytree(ROOT / "lit_peft", package, ignore=ignore)
    shutil.copytree(ROOT / "callbacks", package / "callbacks", ignore=ignore)
    (file,) = re.findall(r"Save this as `lit_peft/(methods/\w+\.py)`", page)
    (package / file).write_text(code, encoding="utf-8")
    registry = package / "methods" / "registry.py"
    before, opening, after = registry.read_text(encoding="utf-8").partition("METHODS: dict[str, Method] = {\n")
    assert opening and line.count("\n") == 1
    registry.write_text(before + opening + line + after, encoding="utf-8")

    texts = tmp_path / "texts.jsonl"
    sentences = [row.rsplit(",", 1)[0] for row in reviews.read_text(encoding="utf-8").splitlines()[1:]]
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences))
    (tmp_path / "session.py").write_text(SESSION, encoding="utf-8")
    command = [sys.executable, "session.py", str(decoder), str(texts), str(package)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lit_peft_method": "no_such"}, "'no_such', which is not known"),
        ({"settings": {"target_module": ["q"]}}, "'target_module', which HeadOnlySettings does not have"),
        ({"settings": None}, "has no settings"),
        ({"settings": {"modules_to_save": ["lm_head", "model.norm"]}}, "does not fit this model"),
    ],
    ids=["method", "name", "none", "tensors"],
)
def test_a_folder_of_our_own_format_that_does_not_fit_is_refused(
    change: dict[str, object], words: str, tmp_path: Path
) -> None:
    import torch
    from models import make
    from safetensors.torch import save_file

    import lit_peft

    model = make("llama")
    config = {"lit_peft_method": "head_only", "settings": {"modules_to_save": ["lm_head"]}, **change}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"lm_head.weight": torch.zeros(61, 32)}, tmp_path / "adapter_model.safetensors")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(lit_peft.LitPeftError, match=words):
        lit_peft.load_adapter(model, tmp_path, check_base=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
