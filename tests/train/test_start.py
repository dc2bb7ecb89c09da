"""What a training starts from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_steerlm import config as configs
from nemo_steerlm.formats import model_folder
from nemo_steerlm.megatron import parallel
from nemo_steerlm.models.base import model_config
from nemo_steerlm.models.policy import AttributeConditionedGPT
from nemo_steerlm.models.regressor import AttributeRegressor
from nemo_steerlm.train.start import start_model
from nemo_steerlm.verbs import convert
from tests.tokenizers import bpe


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Hugging Face folder with its tokenizer, and the model folder that `import` makes of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    source, imported = tmp_path_factory.mktemp("start") / "hf", tmp_path_factory.mktemp("start") / "imported"
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=410)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=64)).save_pretrained(source)
    bpe(source, markers=True)
    convert.import_main(configs.ImportConfig(input=str(source), output=str(imported)))
    return source, imported


@pytest.mark.parametrize("cls", [AttributeRegressor, AttributeConditionedGPT])
def test_a_hugging_face_folder_is_as_good_as_its_import(folders: tuple[Path, Path], cls: type) -> None:
    attributes = configs.AttributesConfig(preset="helpsteer").require()
    states: list[dict[str, Any]] = []
    kind: Any = configs.TrainRegressorConfig if cls is AttributeRegressor else configs.TrainSftConfig
    for folder in folders:
        config = kind(
            output="unused",
            data=(configs.DataConfig if cls is AttributeRegressor else configs.PolicyDataConfig)(train="unused"),
            model=(configs.RegressorModelConfig if cls is AttributeRegressor else configs.ModelConfig)(
                init=str(folder)
            ),
            optimizer=configs.OptimizerConfig(lr=1e-3),
            trainer=configs.TrainerConfig(max_steps=1, global_batch_size=1, micro_batch_size=1),
        )
        parallel.initialize(config.parallel, config.seed)
        states.append(start_model(cls, config, attributes).chunks[0].state_dict())
    assert states[0].keys() == states[1].keys() and any("decoder.layers.1." in name for name in states[0])
    for name, value in states[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, states[1][name]), name


def test_a_hugging_face_folder_that_is_not_finite_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from nemo_steerlm.errors import CheckpointError

    source = shutil.copytree(folders[0], tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("inf")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{source}: weights that are not finite \(.*layers\.1\.mlp"):
        convert.import_main(configs.ImportConfig(input=str(source), output=str(tmp_path / "imported")))
    assert not list(tmp_path.glob("imported*"))


def test_a_model_that_is_loaded_draws_no_random_weights(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawing takes longer than reading: of 13B parameters about a minute on a core."""

    def drawn(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        raise AssertionError(f"{list(tensor.shape)} drawn")

    monkeypatch.setattr(torch.Tensor, "normal_", drawn)
    config, tokenizer = model_config(model_folder.read(folders[1])), model_folder.read_tokenizer(folders[1])
    model = AttributeConditionedGPT(config, tokenizer)
    with pytest.raises(AssertionError, match="drawn"):
        model.build()
    parallel.initialize(model.parallel, 0)
    model.load_weights(folders[1])


@pytest.mark.parametrize(
    ("rank", "said"), [(0, "1e-05 (default for full fine-tuning)"), (2, "0.0001 (default for LoRA)")]
)
def test_a_rate_that_is_not_given_is_settled_and_said(
    folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture, rank: int, said: str
) -> None:
    config = configs.TrainSftConfig(
        output="unused",
        data=configs.PolicyDataConfig(train="unused"),
        model=configs.ModelConfig(init=str(folders[1]), lora=configs.LoRAConfig(rank=rank)),
        trainer=configs.TrainerConfig(max_steps=1, global_batch_size=1, micro_batch_size=1),
    )
    parallel.initialize(config.parallel, config.seed)
    with caplog.at_level("INFO"):
        model = start_model(AttributeConditionedGPT, config, configs.AttributesConfig(preset="helpsteer").require())
    assert [line for line in caplog.messages if "optimizer.lr" in line] == [f"optimizer.lr: {said}"]
    assert model.cfg.optimizer.lr == config.optimizer.lr == float(said.split()[0])
