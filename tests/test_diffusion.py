"""Pipeline directories of diffusers: what is read of them, what comes out, and the pictures that it gives."""

import json
import shutil

import numpy as np
import pytest
import torch
from pipelines import FACTORY, save_ddpm, save_dit, save_sd, save_xl

import effc
from effc import package
from effc.errors import SourceError
from effc.source import from_pipeline, guess
from kit import assert_letter, cli, content, leftovers, process

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.slow
ROLES = {
    "ddpm": ["unet"],
    "sd": ["text_encoder", "unet", "vae_decoder", "vae_encoder"],
    "xl": ["text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder"],
    "dit": ["transformer", "vae_decoder", "vae_encoder"],
}
SAVED = {"ddpm": save_ddpm, "sd": save_sd, "xl": save_xl, "dit": save_dit}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pipelines of every shape, and their float packages."""
    found = tmp_path_factory.mktemp("diffusion")
    for name, save in SAVED.items():
        save(found / name)
        ran = cli("compile", found / name, "-o", found / f"{name}-out", "--no-bench")
        assert ran.code == 0, ran.err
    return found


@pytest.mark.parametrize("name", ROLES)
def test_a_package_has_an_engine_for_each_part_and_the_files_beside_it(place, name):
    out = place / f"{name}-out"
    manifest = package.read(out)
    assert manifest.kind == "diffusion" and [e.role for e in manifest.engines] == ROLES[name]
    assert guess(str(place / name)) == {"diffusers": str(place / name)}
    for file in ("model_index.json", "scheduler/scheduler_config.json"):
        assert (out / file).read_bytes() == (place / name / file).read_bytes()
    ran = cli("verify", out)
    assert ran.code == 0, ran.err


def test_sizes_of_latents_are_free_where_the_model_leaves_them(place):
    manifest = package.read(place / "sd-out")
    shapes = {e.role: {p.name: p.shape for p in e.inputs} for e in manifest.engines}
    assert shapes["unet"]["sample"] == ("batch", 4, "height", "width")
    assert shapes["unet"]["timestep"] == (1,)
    assert shapes["vae_decoder"]["latent_sample"] == ("batch", 4, "height", "width")
    (link,) = manifest.links
    assert (link.producer, link.consumer) == ("text_encoder", "unet")
    with effc.Engine.open(place / "sd-out", "unet", threads=1) as engine:
        feeds = {
            "sample": np.zeros((3, 4, 4, 12), np.float32), "timestep": np.array([7.0], np.float32),
            "encoder_hidden_states": np.zeros((3, 12, 24), np.float32),
        }  # fmt: skip
        assert engine(feeds)["out_sample"].shape == (3, 4, 4, 12)


def pictures(place, *words):
    ran = cli("run", *words, "-o", place)
    assert ran.code == 0, ran.err
    return np.asarray(pytest.importorskip("PIL.Image").open(place))


def noise_of(seed, shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((1, *shape), np.float32))


def is_near(found, wanted):
    """But for rounding of what lies between two grey values."""
    return np.abs(found.astype(int) - (wanted * 255).round().astype(int)).max() <= 1


def test_a_picture_of_text_is_that_of_diffusers(place, tmp_path):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(place / "sd", safety_checker=None)
    wanted = pipe(
        "a cat", negative_prompt="dog", num_inference_steps=6, guidance_scale=3.0,
        latents=noise_of(5, (4, 8, 8)), output_type="np", height=16, width=16,
    ).images  # fmt: skip
    words = ("--steps", 6, "--seed", 5, "--prompt", "a cat", "--negative", "dog", "--guidance", 3)
    assert is_near(pictures(tmp_path / "a.png", place / "sd-out", *words), wanted[0])


def test_a_picture_of_two_text_encoders_is_that_of_diffusers(place, tmp_path):
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(place / "xl", add_watermarker=False)
    wanted = pipe(
        "a cat", num_inference_steps=6, guidance_scale=3.0, latents=noise_of(5, (4, 8, 8)),
        output_type="np", height=16, width=16,
    ).images  # fmt: skip
    words = ("--steps", 6, "--seed", 5, "--prompt", "a cat", "--guidance", 3)
    assert is_near(pictures(tmp_path / "a.png", place / "xl-out", *words), wanted[0])


def test_a_picture_of_pixels_is_that_of_diffusers(place, tmp_path):
    unet = diffusers.UNet2DModel.from_pretrained(place / "ddpm" / "unet")
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(6)
    x = noise_of(5, (1, 8, 8))
    for time in scheduler.timesteps:
        with torch.no_grad():
            x = scheduler.step(unet(x, time).sample, time, x).prev_sample
    words = ("--steps", 6, "--seed", 5, "--sampler", "DDIMScheduler")
    found = pictures(tmp_path / "a.png", place / "ddpm-out", *words)
    assert is_near(found, (x / 2 + 0.5).clamp(0, 1).numpy()[0, 0])


def test_a_class_with_guidance_is_that_of_diffusers(place, tmp_path, monkeypatch):
    pipe = diffusers.DiTPipeline.from_pretrained(place / "dit")
    drawn = noise_of(5, (4, 8, 8))
    module = __import__(type(pipe).__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: drawn)
    full = torch.full
    monkeypatch.setattr(
        module.torch, "tensor",
        lambda data, **how: full((len(data),), 10) if data == [1000] else torch.as_tensor(data),
    )  # fmt: skip
    wanted = pipe([3], guidance_scale=2.0, num_inference_steps=6, output_type="np").images
    words = ("--steps", 6, "--seed", 5, "--label", 3, "--guidance", 2)
    assert is_near(pictures(tmp_path / "a.png", place / "dit-out", *words), wanted[0])


def test_the_same_seed_is_the_same_picture_whoever_is_beside_it(place, tmp_path):
    out = place / "sd-out"
    one = pictures(tmp_path / "one.png", out, "--steps", 4, "--seed", 8)
    again = pictures(tmp_path / "again.png", out, "--steps", 4, "--seed", 8)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    ran = cli("run", out, "--steps", 4, "--seed", 7, "--count", 3, "-o", tmp_path / "many.png")
    assert ran.code == 0 and sorted(f.name for f in tmp_path.glob("many*")) == [
        "many-1.png", "many-2.png", "many-3.png",
    ]  # fmt: skip
    second = np.asarray(pytest.importorskip("PIL.Image").open(tmp_path / "many-2.png"))
    assert np.abs(second.astype(int) - one.astype(int)).max() <= 1
    assert np.array_equal(one, again)


def test_painting_loads_no_torch_and_says_what_it_took(place, tmp_path):
    words = ("run", place / "sd-out", "--steps", 3, "--prompt", "a", "-o", tmp_path / "a.png")
    code = (
        "import sys; from effc import cli; sys.argv[1:] = {!r}\ntry: cli.main()\nexcept SystemExit as e: "
        + ("sys.exit(e.code or ('torch' in sys.modules and 9))")
    )
    import subprocess
    import sys

    argv = [*map(str, words), "--json", str(tmp_path / "r.json")]
    ran = subprocess.run([sys.executable, "-c", code.format(argv)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["steps"], found["sampler"], found["guidance"]) == (3, "PNDM", 7.5)
    assert found["pictures"] == ["a.png"] and len(found["times"]) == 4


def test_a_run_that_fails_or_is_stopped_leaves_no_picture(place, tmp_path, monkeypatch):
    from effc import diffusion

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(diffusion, "pixels", stopped)
    ran = cli("run", place / "ddpm-out", "--steps", 2, "-o", tmp_path / "a.png")
    assert ran.code == 130 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--steps", 1001, "-o", "a.png"), "trained on 1000 steps"),
        (("-o", "a.gif"), "is no picture"),
        (("-o", "nowhere/a.png"), "cannot be written"),
        (("-o", "a.png", "--prompt", "a cat"), "told no text"),
        (("-o", "a.png", "--label", 1), "told nothing but the time"),
        (("-o", "a.png", "--sampler", "DDIMSchedule"), "did you mean 'DDIMScheduler'"),
        (("-o", "a.png", "--target", "openvino"), "no engine for 'openvino'"),
        (("--prompt", "a cat"), "writes no text"),
    ],
)
def test_wishes_that_do_not_fit_are_letters(place, tmp_path, monkeypatch, words, part):
    monkeypatch.chdir(tmp_path)
    ran = cli("run", place / "ddpm-out", *words)
    assert_letter(ran, "UsageError", 2, part)
    assert not list(tmp_path.iterdir())


def test_a_picture_lies_in_no_package_and_a_foreign_class_is_refused(place):
    out = place / "dit-out"
    before = content(out)
    ran = cli("run", out, "--steps", 2, "-o", out / "a.png")
    assert_letter(ran, "UsageError", 2, "holds only what its manifest lists")
    ran = cli("run", out, "--steps", 2, "--label", 10, "-o", place / "a.png")
    assert_letter(ran, "UsageError", 2, "classes 0 to 9")
    assert content(out) == before and not (place / "a.png").exists()


def changed(place, tmp_path, name="sd"):
    return shutil.copytree(place / name, tmp_path / name)


def edit(file, **changes):
    found = json.loads(file.read_text())
    file.write_text(json.dumps({**found, **changes}))


def test_what_is_not_a_whole_pipeline_of_known_classes_is_refused(place, tmp_path):
    def refused(change, part, name="sd"):
        copy = changed(place, tmp_path / part.replace(" ", "")[:20].replace("/", ""), name)
        change(copy)
        with pytest.raises(SourceError, match=part) as found:
            from_pipeline(copy)
        assert found.value.hint

    refused(lambda d: shutil.rmtree(d / "unet"), "names unet, and .* has no config.json")
    refused(lambda d: shutil.rmtree(d / "scheduler"), "has no scheduler/scheduler_config.json")
    refused(lambda d: (d / "model_index.json").unlink(), "is no pipeline directory")
    refused(
        lambda d: edit(d / "model_index.json", unet=["diffusers", "FluxModel"]),
        "unet is diffusers.FluxModel",
    )
    refused(
        lambda d: edit(d / "model_index.json", unet=["mine", "UNet2DModel"]),
        "unet is mine.UNet2DModel",
    )
    refused(lambda d: edit(d / "model_index.json", unet=None), "names no denoiser")
    refused(
        lambda d: edit(d / "model_index.json", lora=["diffusers", "X"]), "unknown component 'lora'"
    )
    refused(
        lambda d: edit(d / "unet/config.json", block_out_channels=[8, 4096]), "asks for .* values"
    )
    refused(lambda d: edit(d / "unet/config.json", layers_per_block=10**6), "layers_per_block")
    refused(
        lambda d: edit(d / "unet/config.json", class_embed_type="identity"), "told more than text"
    )
    refused(lambda d: edit(d / "unet/config.json", sample_size=None), "no sample_size")

    def pickled(copy):
        (copy / "vae/diffusion_pytorch_model.safetensors").rename(
            copy / "vae/diffusion_pytorch_model.bin"
        )

    refused(pickled, "only as pickle")

    def cut(copy):
        file = copy / "vae/diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])

    refused(cut, "does not load")

    def linked(copy):
        (copy / "tokenizer/vocab.txt").symlink_to(tmp_path)
        (tmp_path / "secret.txt").write_text("mine")
        (copy / "tokenizer/added.txt").symlink_to(tmp_path / "secret.txt")

    refused(linked, "link out of the model directory")


def test_a_compile_that_fails_leaves_nothing(place, tmp_path):
    copy = changed(place, tmp_path)
    shutil.rmtree(copy / "vae")
    ran = cli("compile", copy, "-o", tmp_path / "out", "--no-bench")
    assert_letter(ran, "SourceError", 4, "names vae")
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)


def test_a_model_of_ones_own_is_sampled_as_its_factory_says(tmp_path):
    (tmp_path / "mine.py").write_text(FACTORY)
    word = f"{tmp_path / 'mine.py'}:make"
    ran = cli("compile", word, "-o", tmp_path / "out", "--no-bench")
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text()) == {
        "_class_name": "DDPMScheduler"
    }
    found = pictures(tmp_path / "a.png", tmp_path / "out", "--steps", 5)
    assert found.shape == (6, 6)
    for options, part in (
        ("name=Nobody", "unknown sampler 'Nobody'"),
        ("word=x", "takes no 'sample'"),
    ):
        key, _, value = options.partition("=")
        ran = cli(
            "compile", word, "-o", tmp_path / "none", "--set", f"source.options={{{key}: {value}}}"
        )
        assert_letter(ran, "SourceError", 4, part)


def test_float_steps_are_nothing_for_a_model_that_counts(tmp_path):
    (tmp_path / "mine.py").write_text(FACTORY)
    assert (
        cli("compile", f"{tmp_path / 'mine.py'}:make", "-o", tmp_path / "out", "--no-bench").code
        == 0
    )
    ran = cli(
        "run",
        tmp_path / "out",
        "--steps",
        7,
        "--sampler",
        "EulerDiscreteScheduler",
        "-o",
        tmp_path / "a.png",
    )
    assert_letter(ran, "UsageError", 2, "between two steps")


def test_a_package_of_another_kind_paints_nothing(tmp_path):
    from kit import made

    ran = process("run", made().out, "-o", tmp_path / "a.png")
    assert_letter(ran, "UsageError", 2, "makes no pictures")
