"""A pipeline's package as diffusers keeps ONNX files, opened by diffusers itself."""

import json

import numpy as np
import pytest
import repository
from pipelines import save_sd

from effc import layout
from kit import assert_letter, cli, content, leftovers

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.slow


def test_diffusers_opens_the_copy_and_paints_what_effc_paints(tmp_path):
    save_sd(tmp_path / "sd")
    ran = cli("compile", tmp_path / "sd", "-o", tmp_path / "out", "--no-bench")
    assert ran.code == 0, ran.err
    ran = cli("package", tmp_path / "out", "--layout", "diffusers", "-o", tmp_path / "copy")
    assert ran.code == 0, ran.err
    assert sorted(content(tmp_path / "copy")) == [
        "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/model.onnx",
        "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "unet/config.json", "unet/model.onnx",
        "vae_decoder/config.json", "vae_decoder/model.onnx", "vae_encoder/config.json", "vae_encoder/model.onnx",
    ]  # fmt: skip
    index = json.loads((tmp_path / "copy" / "model_index.json").read_text())
    assert index["_class_name"] == "OnnxStableDiffusionPipeline" and "vae" not in index
    pipe = diffusers.OnnxStableDiffusionPipeline.from_pretrained(
        tmp_path / "copy", provider="CPUExecutionProvider"
    )
    noise = np.random.default_rng(5).standard_normal((1, 4, 8, 8), np.float32)
    made = pipe(
        "a cat", num_inference_steps=5, guidance_scale=3.0, latents=noise, height=64, width=64, output_type="np"
    ).images  # fmt: skip
    words = (
        "--steps",
        5,
        "--seed",
        5,
        "--prompt",
        "a cat",
        "--guidance",
        3,
        "-o",
        tmp_path / "a.png",
    )
    assert cli("run", tmp_path / "out", *words).code == 0
    found = np.asarray(pytest.importorskip("PIL.Image").open(tmp_path / "a.png")).astype(int)
    assert np.abs(found - (made[0] * 255).round().astype(int)).max() <= 1
    layout.write(tmp_path / "out", "triton", tmp_path / "r")
    served = repository.Server(tmp_path / "r")  # opens every part, and holds its config to the file
    assert set(served.configs) == {
        f"sd_{role}" for role in ("text_encoder", "unet", "vae_encoder", "vae_decoder")
    }
    assert "once for every step" in (tmp_path / "r" / "sd_unet" / "config.pbtxt").read_text()
    ran = cli("package", tmp_path / "out", "--layout", "transformers.js", "-o", tmp_path / "no")
    assert_letter(ran, "UsageError", 2, "for causal language models")


def test_other_packages_have_no_such_layout(tmp_path):
    from kit import made

    ran = cli("package", made().out, "--layout", "diffusers", "-o", tmp_path / "no")
    assert_letter(ran, "UsageError", 2, "was not made of a pipeline directory")
    assert not (tmp_path / "no").exists() and not leftovers(tmp_path)
    ran = cli("package", made().out, "--layout", "difusers", "-o", tmp_path / "no")
    assert_letter(ran, "UsageError", 2, "did you mean 'diffusers'")
