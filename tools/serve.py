"""Serve a model to OpenAI's clients and to a browser: python tools/serve.py --load_checkpoint DIR"""

import ipaddress
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from telechat.cli import ArgumentParser, path_argument, run  # noqa: E402
from telechat.errors import InputError  # noqa: E402
from telechat.progress import Progress  # noqa: E402
from telechat.serving.api_key import hide_argument, read_api_key  # noqa: E402

MAX_BATCH = 8  # sequences, where neither the user nor memory says otherwise


def main(argv=None):
    arguments = parse_arguments(argv)
    try:
        from telechat.serving.access import read_origin
        from telechat.serving.app import App
        from telechat.serving.http_server import HttpServer
    except ImportError as error:
        raise InputError(f"serving needs the package {error.name}; pip install 'telechat[serve]'") from None
    origins = [read_origin(origin) for origin in arguments.allow_origin]
    from telechat.config import TeleChatConfig
    from telechat.generation.settings import GenerationSettings

    # Everything that can be wrong with the input shows before the weights are read.
    config = TeleChatConfig.from_pretrained(arguments.load_checkpoint)
    settings = GenerationSettings.load(arguments.load_checkpoint, config)

    from telechat.generation.engine import Engine
    from telechat.generation.memory import FLOAT32, cache_bytes, cache_that_fits, check_inference_memory
    from telechat.memory_check import available_bytes
    from telechat.nn.kernels import on_cpu
    from telechat.parallel.inference import load_for_inference
    from telechat.parallel.mesh import local_process_count
    from telechat.parallel.parallel_config import process_count
    from telechat.serving.metrics import Metrics
    from telechat.serving.protocol import Model
    from telechat.serving.service import Service
    from telechat.serving.stopping import StopSignals

    if arguments.key_shows and process_count() > 1:
        raise InputError("--api_key would show in the list of processes, where the launcher's arguments stay; give "
                         "--api_key_file or the variable TELECHAT_API_KEY")
    fixed = [name for name, value in (("slots", arguments.max_batch), ("length", arguments.max_length)) if value]
    wanted = arguments.max_batch or MAX_BATCH, arguments.max_length or settings.max_length
    slots, max_length = cache_that_fits(config, arguments.dtype, *wanted, available_bytes() if on_cpu() else None,
                                        process_count(), local_process_count(), fixed)
    check_inference_memory(config, arguments.dtype, f"lower --max_batch {slots} or --max_length {max_length}",
                           arguments.ignore_memory, prompt=max_length, slots=slots, length=max_length, logits=slots)
    lead = process_count() == 1 or os.environ.get("RANK_ID", "0") == "0"
    http = HttpServer(arguments.host, arguments.port) if lead and os.environ.get("MS_ROLE") != "MS_SCHED" else None
    model, world = load_for_inference(arguments.load_checkpoint, arguments.dtype, arguments.lora,
                                      False if arguments.no_paged_attention else None)
    engine = Engine(model, max_length)
    width = FLOAT32 if on_cpu() or arguments.dtype == "float32" else 2
    cache = cache_bytes(config, slots, max_length, width, process_count())
    reserve(engine, slots, max_length, cache)
    service = Service(engine, world, Metrics(), arguments.max_queue, arguments.time_limit)
    StopSignals(service, world)
    if http is None:
        service.warm_up()
        service.run()
        return 0
    if (slots, max_length) != wanted:
        print(f"memory allows no {wanted[0]} sequences of {wanted[1]} tokens, the default, beside the weights; --max_batch "
              "and --max_length choose otherwise", flush=True)
    print(f"{arguments.load_checkpoint}: {slots} sequences of {engine.length} tokens at a time, "
          f"{cache / 1e9:.3g} GB of key-value cache; compiling", flush=True)
    with Progress("compiling"):
        service.warm_up()
    name = arguments.model_name or pathlib.Path(arguments.load_checkpoint).absolute().name
    app = App(service, Model(name, settings, engine.length, config.vocab_size, arguments.system), arguments.api_key,
              origins)
    if arguments.api_key is None and not is_loopback(arguments.host):
        print(f"warning: --host {arguments.host} lets other machines in, and there is no key; give --api_key_file",
              file=sys.stderr)
    http.start(app.asgi)
    print(f"chat with {name!r} at {http.url}/ (interface for programs: {http.url}/v1); Ctrl-C stops", flush=True)
    try:
        service.run()
    finally:
        http.stop()
    print("stopped", flush=True)
    return 0


def reserve(engine, slots, length, cache):
    """Take the cache's memory, ``cache`` bytes, or say what does not fit."""
    try:
        engine.reserve(slots, length)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        raise InputError(f"the device has no room for {cache / 1e9:,.1f} GB of key-value cache beside the weights, "
                         f"--max_batch {slots} sequences of --max_length {length} tokens; lower either") from None


def parse_arguments(argv):
    parser = ArgumentParser(description="Serve a model: OpenAI's interface, and a page to chat in a browser. Sampling "
                                        "defaults come from the checkpoint's generation_config.json.")
    parser.add_argument("--load_checkpoint", type=path_argument, required=True,
                        help="checkpoint directory with its tokenizer")
    parser.add_argument("--lora", type=path_argument, metavar="DIR",
                        help="LoRA adapter, as the peft package saves it, to add to the weights")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--api_key_file", type=path_argument,
                        help="file with the key that clients must send in its only line; or set the variable "
                             "TELECHAT_API_KEY")
    parser.add_argument("--api_key", help="the key itself, which others may see in the list of processes until the "
                                          "server has read it")
    parser.add_argument("--allow_origin", nargs="+", default=[], metavar="URL",
                        help="origins whose pages may use the server in a browser, as http://localhost:3000; * is any")
    parser.add_argument("--model_name", help="name that clients use; the directory's name if left out")
    parser.add_argument("--max_batch", type=int,
                        help=f"sequences answered at a time; default: {MAX_BATCH}, or what memory allows")
    parser.add_argument("--max_length", type=int,
                        help="longest sequence, prompt and answer together; default: the checkpoint's, or what memory "
                             "allows")
    parser.add_argument("--max_queue", type=int, default=64, help="sequences that may wait; more are refused (429)")
    parser.add_argument("--time_limit", type=float, default=600.0, help="seconds an answer may take, waiting included")
    parser.add_argument("--system", choices=("refuse", "prepend"), default="refuse",
                        help="what becomes of a system message: TeleChat was trained without; prepend puts it in front "
                             "of the first question")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="of the weights in memory; bfloat16 on Ascend")
    parser.add_argument("--no_paged_attention", action="store_true",
                        help="on Ascend: decode on a plain cache, by portable operations")
    parser.add_argument("--ignore_memory", action="store_true", help="start though memory does not seem to suffice")
    arguments = parser.parse_args(argv)
    arguments.key_shows = bool(arguments.api_key)
    if arguments.key_shows:
        hide_argument(arguments.api_key)
    arguments.api_key = read_api_key(arguments.api_key, arguments.api_key_file)
    for name, least in (("max_batch", 1), ("max_length", 8), ("max_queue", 0), ("port", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise InputError(f"--{name} must be at least {least}, not {value}")
    if arguments.port > 65535:
        raise InputError(f"--port must be at most 65535, not {arguments.port}")
    if not arguments.time_limit > 0:
        raise InputError(f"--time_limit must be above 0 seconds, not {arguments.time_limit}")
    return arguments


def is_loopback(host):
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    run(main)
