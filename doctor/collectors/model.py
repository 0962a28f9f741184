"""The served model's `config.json` and the size of its weights, from its folder or the engine's hub cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from doctor.collectors import files
from doctor.collectors.collector import CannotSeeError, Reading, Visit
from doctor.collectors.processes import environment_of
from doctor.readers import model_config
from doctor.snapshot import Absent, Engine, ModelConfig, Source, Unseen, Why, known

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
"""Forms of weight files, the preferred first: an engine loads one form only."""

CONFIG_BYTES = 4 << 20

BESIDE = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Where ModelOpt, AutoGPTQ and AutoAWQ say how they quantized, beside a config.json that says nothing."""


class ServedModels:
    """The configuration of each engine's model."""

    source = Source.MODEL
    deadline_seconds = 4.0
    after_engines = True

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self._known: dict[str, ModelConfig] = {}
        """By `Engine.id`: a running engine's model does not change."""

    def collect(self, visit: Visit) -> Reading:
        """Read each model once. Raises CannotSeeError when there is no engine, or none whose model can be read."""
        unseen: list[Unseen] = []
        fields: dict[str, dict[str, object]] = {}
        for engine in visit.engines:
            found = self._known.get(engine.id) or self._model(engine)
            if isinstance(found, Absent):
                unseen.append(Unseen(self.source, found, f"model of engine {engine.pid}"))
            else:
                self._known[engine.id] = found
                fields[engine.id] = {"model": found}
        if not fields:
            raise CannotSeeError(unseen[0].why if unseen else Absent(Why.NOT_PRESENT, "no serving engine runs here"))
        return Reading(engine_fields=fields, unseen=tuple(unseen))

    def _model(self, engine: Engine) -> ModelConfig | Absent:
        model = engine.flags.model
        if not known(model):
            return Absent(Why.NOT_GIVEN, "its command line names no model")
        tried = "its folders"
        try:
            for folder in _folders(self.root, engine, model):
                tried = f"{folder}/config.json"
                try:
                    text = files.text_of(files.within(self._inside(engine), f"{folder}/config.json"), CONFIG_BYTES)
                except (FileNotFoundError, NotADirectoryError):
                    continue
                return self._read(engine, folder, text)
        except OSError as e:
            return files.why_not(e, tried)
        return Absent(Why.NOT_PRESENT, f"{model} is neither a folder nor in the engine's hub cache")

    def _inside(self, engine: Engine) -> Path:
        return self.root / f"proc/{engine.pid}/root"

    def _read(self, engine: Engine, folder: str, text: str) -> ModelConfig | Absent:
        inside = self._inside(engine)
        config = model_config.read(text, _text_beside(inside, folder))
        if config is None:
            return Absent(Why.FAILED, f"{folder}/config.json is not a model's configuration")
        weights = _weights_bytes(inside, folder)
        return msgspec.structs.replace(
            config,
            path=f"{folder}/config.json",
            weights_bytes=weights or Absent(Why.NOT_PRESENT, f"no weight files in {folder}"),
        )

    def close(self) -> None:
        """Nothing is held open."""


def _text_beside(inside: Path, folder: str) -> str | None:
    paths = (files.within(inside, f"{folder}/{name}") for name in BESIDE)
    found = next((path for path in paths if path.is_file()), None)
    try:
        return None if found is None else files.text_of(found, CONFIG_BYTES)
    except OSError:
        return None


def _folders(root: Path, engine: Engine, model: str) -> Iterator[str]:
    """Yield the folders, as the engine sees them, in which its model may lie. Raises OSError."""
    if model.startswith("/"):
        yield model
        return
    if model.count("/") > 1 or model.startswith(("./", "../", "~")):
        yield f"{(root / f'proc/{engine.pid}/cwd').readlink()}/{model}"
        return
    inside = root / f"proc/{engine.pid}/root"
    for cache in _caches(root, engine):
        repository = f"{cache}/models--{model.replace('/', '--')}"
        try:
            revision = files.word_of(files.within(inside, f"{repository}/refs/main"))
        except OSError:
            revision = ""
        snapshots = files.within(inside, f"{repository}/snapshots")
        names = [entry.name for entry in snapshots.iterdir()] if snapshots.is_dir() else []
        for name in sorted(names, key=lambda name: (name != revision, name)):
            yield f"{repository}/snapshots/{name}"
    yield f"{(root / f'proc/{engine.pid}/cwd').readlink()}/{model}"


def _caches(root: Path, engine: Engine) -> Iterator[str]:
    """Yield the engine's hub caches, in the order in which huggingface_hub looks."""
    words = engine.command_line
    for place, word in enumerate(words):
        if word == "--download-dir" and place + 1 < len(words):
            yield words[place + 1]
        elif word.startswith("--download-dir="):
            yield word.partition("=")[2]
    environment = environment_of(root, engine.pid)
    for name, rest in (
        ("HF_HUB_CACHE", ""),
        ("HUGGINGFACE_HUB_CACHE", ""),
        ("HF_HOME", "/hub"),
        ("XDG_CACHE_HOME", "/huggingface/hub"),
        ("HOME", "/.cache/huggingface/hub"),
    ):
        if environment.get(name):
            yield environment[name] + rest
            return
    yield "/root/.cache/huggingface/hub"


def _weights_bytes(inside: Path, folder: str) -> int:
    """Return the size of the weights on disk; 0 where there are none."""
    where = files.within(inside, folder)
    for form in WEIGHTS:
        sizes = [
            files.within(inside, f"{folder}/{path.name}").stat().st_size
            for path in sorted(where.glob(form))
            if files.within(inside, f"{folder}/{path.name}").exists()
        ]
        if sizes:
            return sum(sizes)
    return 0
