"""RunConfig: one training run, as its YAML file and the command line describe it."""

import dataclasses
import difflib
import re

import yaml

from telechat import fields
from telechat.adapters.lora_config import LoraConfig
from telechat.config import config_keys
from telechat.errors import InputError
from telechat.parallel.parallel_config import ParallelConfig
from telechat.text_files import decode, expand_path, read_file
from telechat.training.train_config import TrainConfig


_PATHS = ("train_dataset", "load_checkpoint", "load_lora", "output_dir", "tokenizer")
_TEXTS = (*_PATHS, "lr_schedule", "dtype", "kernels", "position_embedding")  # the keys that are no numbers
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A run: where things are, how large a batch is, how long it goes on and what it keeps.

    The YAML is flat: these fields and those of `TrainConfig` side by side; ``parallel`` holds those of
    `ParallelConfig`, and may hold micro_batches; ``lora`` those of `LoraConfig`.

    Raises:
        InputError: a value is of the wrong type or out of range; the message names the key.
    """

    train_dataset: str = None  # directory written by tools/preprocess.py
    load_checkpoint: str = None  # directory to start from; None: random weights for `model`
    lora: LoraConfig = None  # train an adapter, the weights staying as they are; None: all weights
    load_lora: str = None  # directory of an adapter to train further; its settings count, but for lora's dropout
    output_dir: str = "output"
    model: dict = None  # architecture of a model from scratch, fields of config.json
    published_model: dict = None  # what tools/estimate.py reckons with where there is no load_checkpoint yet
    tokenizer: str = None  # copied into checkpoints; None: the one of load_checkpoint
    sequence_length: int = None  # what train_dataset must have; None: any
    batch_size: int = 1  # sequences a step, all micro-batches together
    epochs: float = None  # or total_steps
    save_steps: int = 500  # a checkpoint every so many steps, and at the end; 0: at the end only
    keep_checkpoints: int = 2
    eval_steps: int = 0  # evaluation loss every so many steps where the dataset has a split; 0: at checkpoints
    max_skipped_steps: int = 5  # non-finite steps in a row before the run stops
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)

    def __post_init__(self):
        for name in ("train_dataset", "load_checkpoint", "load_lora", "tokenizer"):
            fields.path(name, getattr(self, name), default=None)
        fields.path("output_dir", self.output_dir)
        for name, least in (("batch_size", 1), ("save_steps", 0), ("keep_checkpoints", 1), ("eval_steps", 0),
                            ("max_skipped_steps", 1)):
            object.__setattr__(self, name, fields.whole_number(name, getattr(self, name), least))
        length = fields.whole_number("sequence_length", self.sequence_length, 1, default=None)
        object.__setattr__(self, "sequence_length", length)
        fields.real_number("epochs", self.epochs, above=0, most=1e6, default=None)
        for name in ("model", "published_model"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), dict):
                raise InputError(f"{name} must hold the fields of a config.json, not {fields.shown(getattr(self, name))}")
        if self.batch_size % self.train.micro_batches:
            raise InputError(f"batch_size {self.batch_size} must be a multiple of "
                             f"micro_batches {self.train.micro_batches}")

    @classmethod
    def load(cls, path, overrides=(), flags=None):
        """Read a YAML file, then apply ``key=value`` strings, whose values are read as YAML too.

        ``flags`` holds values that the command line gave by flags of their own.

        Raises:
            InputError: names the file or the command line, and the key with what is wrong about it.
        """
        values = read_yaml(path)
        source = dict.fromkeys(values, path)
        for override in overrides:
            key, separator, text = override.partition("=")
            if not separator:
                raise InputError(f"{override!r} on the command line must have the form key=value")
            try:
                value = parse_yaml(text)
            except InputError as error:
                raise InputError(f"the value of {key}={text[:60]} on the command line {error}") from None
            _assign(values, key, value)
            source[key.split(".")[0]] = "command line"
        values.update(flags or {})
        return cls.from_dict(values, source)

    @classmethod
    def from_dict(cls, values, source=None):
        """Build from the flat mapping of a YAML file; ``source`` says where each key came from. InputError as of `load`."""
        source = source or {}
        values = dict(values)
        run_names = _field_names(cls) - {"train"}
        train_names = _field_names(TrainConfig)
        _check_keys(values, run_names | train_names, source)
        for name in ("model", "published_model"):
            _check_keys(values.get(name), config_keys(), source, name)
        parallel = values.pop("parallel", None)
        parallel = {} if parallel is None else parallel
        _check_keys(parallel, _field_names(ParallelConfig) | {"micro_batches"}, source, "parallel")
        if not isinstance(parallel, dict):
            raise InputError(f"parallel must hold keys such as tensor and pipeline, not {fields.shown(parallel)}")
        lora = values.get("lora")
        _check_keys(lora, _field_names(LoraConfig), source, "lora")
        if lora is not None:
            if not isinstance(lora, dict):
                raise InputError(f"lora must hold keys such as rank and alpha, not {fields.shown(lora)}")
            values["lora"] = LoraConfig(**{key: _number(key, value) for key, value in lora.items()})
        if "micro_batches" in parallel:
            values["micro_batches"] = parallel["micro_batches"]
            parallel = {key: value for key, value in parallel.items() if key != "micro_batches"}
        if values.get("epochs") is not None and values.get("total_steps") is not None:
            raise InputError("give epochs or total_steps, not both")
        for name in ("model", "published_model"):
            if isinstance(values.get(name), dict):
                values[name] = {key: _number(key, value) for key, value in values[name].items()}
        values = {key: expand_path(value) if key in _PATHS and isinstance(value, str) else _number(key, value)
                  for key, value in values.items()}
        train = {key: value for key, value in values.items() if key in train_names}
        run = {key: value for key, value in values.items() if key in run_names}
        return cls(**run, train=TrainConfig(**train), parallel=ParallelConfig(**parallel))

    def to_dict(self):
        """The flat mapping that `from_dict` reads, without keys that are not set."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
                  if field.name not in ("train", "epochs", "parallel", "lora")}
        values["lora"] = None if self.lora is None else self.lora.to_dict()
        values.update(dataclasses.asdict(self.train))
        values["betas"] = list(values["betas"])
        if self.epochs is not None:  # which say how many steps there are, once the data is known
            values["epochs"], values["total_steps"] = self.epochs, None
        parallel = dataclasses.asdict(self.parallel)
        values["parallel"] = {key: list(value) if isinstance(value, tuple) else value
                              for key, value in parallel.items() if value is not None}
        return {key: value for key, value in values.items() if value is not None}


def read_yaml(path):
    """The keys and values of a YAML file, as a dict.

    Raises:
        InputError: names the file, and the line where there is one.
    """
    data = read_file(path, "give --config a YAML file")
    try:
        values = parse_yaml(decode(data))
    except InputError as error:
        raise InputError(f"{path} {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold keys and values")
    return values


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: a key once, and a date is text, since it can only be the name of something here."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise InputError(f"line {key.start_mark.line + 1}: gives the key {key.value[:60]} twice; keep one")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}


def parse_yaml(text):
    """What a YAML text says.

    Raises:
        InputError: it is not YAML, or gives a key twice; the message goes behind a file's name.
    """
    try:
        return yaml.load(text, _Loader)
    except InputError as error:
        raise InputError(f"is not a configuration: {error}") from None
    except RecursionError:
        raise InputError("is not valid YAML (nested too deeply)") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError) as error:
        # PyYAML passes on what Python says of a number or tag that it cannot make sense of.
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        reason = "a number of thousands of digits" if "digits" in str(error) else getattr(error, "problem", None)
        where = f"line {line + 1}: " if line is not None and "\n" in text else ""
        said = f" ({where}{reason})" if reason else f" ({where.rstrip(': ')})" if where else ""
        raise InputError(f"is not valid YAML{said}") from None


def _assign(values, key, value):
    """values["a"]["b"] = value for the key "a.b"."""
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.get(parent)
        values[parent] = inner = dict(inner) if isinstance(inner, dict) else {}
        values = inner
    values[last] = value


def _number(key, value):
    """YAML reads 1e-5 as text, since it lacks a dot; people mean the number."""
    if isinstance(value, list):
        return [_number(key, item) for item in value]
    if isinstance(value, str) and key not in _TEXTS and _NUMBER.fullmatch(value):
        return float(value)
    return value


def _field_names(cls):
    return {field.name for field in dataclasses.fields(cls)}


def _check_keys(values, known, source, parent=None):
    """Refuse a key that is not known, naming the nearest; ``parent`` is the key whose mapping this is."""
    for key in values if isinstance(values, dict) else ():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.0)[0]
            prefix = f"{parent}." if parent else ""
            where = source.get(parent or key, "the run's configuration")
            raise InputError(f"{where}: unknown key {prefix}{key}; the nearest known key is {prefix}{near}")
