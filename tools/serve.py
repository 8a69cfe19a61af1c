"""Serve a model to OpenAI's clients and to a browser: python tools/serve.py --load_checkpoint DIR"""

import ipaddress
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from telechat.cli import ArgumentParser, add_inference_flags, path_argument, run  # noqa: E402
from telechat.errors import InputError  # noqa: E402
from telechat.generation.prompt_lookup import check_speculation  # noqa: E402
from telechat.progress import Progress  # noqa: E402
from telechat.serving.api_key import hide_argument, read_api_key  # noqa: E402

MAX_BATCH = 8  # sequences, where the user does not say otherwise


def main(argv=None):
    arguments = parse_arguments(argv)
    try:
        from telechat.serving.access import read_origin
        from telechat.serving.app import App
        from telechat.serving.http_server import HttpServer
    except ImportError as error:
        raise InputError(f"serving needs the package {error.name}; pip install 'telechat[serve]'") from None
    origins = [read_origin(origin) for origin in arguments.allow_origin]
    from telechat.adapters.named import attached_bytes, factor_bytes, open_adapters, read_lora
    from telechat.config import TeleChatConfig
    from telechat.generation.settings import GenerationSettings

    # Everything that can be wrong with the input shows before the weights are read.
    config = TeleChatConfig.from_pretrained(arguments.load_checkpoint, quantised=True)
    settings = GenerationSettings.load(arguments.load_checkpoint, config)
    name = arguments.model_name or pathlib.Path(arguments.load_checkpoint).absolute().name
    lora, named = read_lora(arguments.lora, name)
    adapters = open_adapters(named, config)
    named_bytes = factor_bytes(adapters, config)
    beside = named_bytes + attached_bytes(lora, config)

    from telechat.generation.engine import Engine
    from telechat.generation.memory import (CachePlan, cache_width, cache_bytes, check_inference_memory, plan_cache,
                                            runs_operators)
    from telechat.memory_check import available_bytes
    from telechat.nn.kernels import on_cpu
    from telechat.parallel.collective_errors import run_on_all
    from telechat.parallel.collectives import gather_objects
    from telechat.parallel.inference import adapters_beside, load_for_inference
    from telechat.parallel.rendezvous import local_process_count
    from telechat.parallel.parallel_config import process_count
    from telechat.serving.metrics import Metrics
    from telechat.serving.protocol import Model
    from telechat.serving.service import Service
    from telechat.serving.stopping import StopSignals

    if arguments.key_shows and process_count() > 1:
        raise InputError("--api_key would show in the list of processes, where the launcher's arguments stay; give "
                         "--api_key_file or the variable TELECHAT_API_KEY")
    wanted = arguments.max_length or settings.max_length
    operators = runs_operators(arguments.dtype)
    plan = plan_cache(config, arguments.dtype, arguments.max_batch, wanted, available_bytes() if on_cpu() else None,
                      arguments.cache_memory, arguments.max_length is not None, process_count(), local_process_count(),
                      operators=operators, adapters=beside)
    lower = f"lower --cache_memory or --max_length {plan.length}"
    check_inference_memory(config, arguments.dtype, lower, arguments.ignore_memory, prompt=plan.length,
                           slots=plan.slots, length=plan.length, logits=plan.slots, cached=plan.tokens,
                           operators=operators, adapters=beside)
    lead = process_count() == 1 or os.environ.get("RANK_ID", "0") == "0"
    http = HttpServer(arguments.host, arguments.port) if lead and os.environ.get("MS_ROLE") != "MS_SCHED" else None
    model, world = load_for_inference(arguments.load_checkpoint, arguments.dtype, lora,
                                      False if arguments.no_paged_attention else None)
    if not on_cpu() and arguments.cache_memory is None:
        from telechat.generation.card_memory import card_bytes, plan_card_cache
        total, free = card_bytes()
        free -= named_bytes
        plan = run_on_all(lambda: plan_card_cache(config, arguments.dtype, arguments.max_batch, wanted, total, free,
                                                  arguments.max_length is not None, process_count()), world)
    # What one process has room for may be less than what another has: all take the least.
    plan = CachePlan(*map(min, *gather_objects(list(plan), world))) if world.size > 1 else plan
    engine = Engine(model, plan.length, not arguments.no_prefix_cache, arguments.speculate,
                    adapters_beside(model, adapters, world))
    cache = cache_bytes(config, 1, plan.tokens, cache_width(arguments.dtype), process_count())
    reserve(engine, plan, cache)
    service = Service(engine, world, Metrics(), arguments.max_queue, arguments.time_limit, arguments.prefill_chunk,
                      arguments.speculate)
    StopSignals(service, world)
    if http is None:
        service.warm_up()
        service.run()
        return 0
    if plan.length != wanted:
        print(f"the cache has no room for a sequence of {wanted} tokens, the checkpoint's length; --max_length and "
              "--cache_memory choose otherwise", flush=True)
    print(f"{arguments.load_checkpoint}: {plan.slots} sequences of up to {engine.length} tokens at a time, {plan.tokens} "
          f"tokens together in {cache / 1e9:.3g} GB of key-value cache; compiling", flush=True)
    with Progress("compiling"):
        service.warm_up()
    app = App(service, Model(name, settings, engine.length, config.vocab_size, arguments.system, tuple(adapters)),
              arguments.api_key, origins)
    if arguments.api_key is None and not is_loopback(arguments.host):
        print(f"warning: --host {arguments.host} lets other machines in, and there is no key; give --api_key_file",
              file=sys.stderr)
    http.start(app.asgi)
    if adapters:
        print(f"beside it, with adapters: {', '.join(map(repr, adapters))}")
    print(f"chat with {name!r} at {http.url}/ (interface for programs: {http.url}/v1); Ctrl-C stops", flush=True)
    try:
        service.run()
    finally:
        http.stop()
    print("stopped", flush=True)
    return 0


def reserve(engine, plan, cache):
    """Take the memory of the `CachePlan`, ``cache`` bytes, or say what does not fit."""
    try:
        engine.reserve(plan.slots, plan.length, plan.blocks(engine.block_size))
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        raise InputError(f"the device has no room for {cache / 1e9:,.1f} GB of key-value cache beside the weights, "
                         f"{plan.tokens} tokens; give a smaller --cache_memory, or lower --max_batch {plan.slots} or "
                         f"--max_length {plan.length}") from None


def parse_arguments(argv):
    parser = ArgumentParser(description="Serve a model: OpenAI's interface, and a page to chat in a browser. Sampling "
                                        "defaults come from the checkpoint's generation_config.json.")
    parser.add_argument("--load_checkpoint", type=path_argument, required=True,
                        help="checkpoint directory with its tokenizer")
    parser.add_argument("--lora", action="append", default=[], metavar="[NAME=]DIR",
                        help="LoRA adapter, as the peft package saves it: DIR is added to the weights, or beside quantised "
                             "ones; NAME=DIR, as often as wanted, stays beside them and is a model of that name")
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
    parser.add_argument("--max_batch", type=int, default=MAX_BATCH, help="sequences answered at a time, at most")
    parser.add_argument("--max_length", type=int,
                        help="longest sequence, prompt and answer together; default: the checkpoint's, or what memory "
                             "allows")
    parser.add_argument("--cache_memory", metavar="SIZE",
                        help="key-value cache that all sequences share, e.g. 4GB, in each process; default: what is free less "
                             "a tenth, and no more than --max_batch sequences of --max_length can fill")
    parser.add_argument("--prefill_chunk", type=int, default=512, metavar="TOKENS",
                        help="tokens of prompts read between two tokens of the answers that run, at most")
    parser.add_argument("--max_queue", type=int, default=64, help="sequences that may wait; more are refused (429)")
    parser.add_argument("--time_limit", type=float, default=600.0, help="seconds an answer may take, waiting included")
    parser.add_argument("--system", choices=("refuse", "prepend"), default="refuse",
                        help="what becomes of a system message: TeleChat was trained without; prepend puts it in front "
                             "of the first question")
    add_inference_flags(parser)
    arguments = parser.parse_args(argv)
    arguments.key_shows = bool(arguments.api_key)
    if arguments.key_shows:
        hide_argument(arguments.api_key)
    arguments.api_key = read_api_key(arguments.api_key, arguments.api_key_file)
    for name, least in (("max_batch", 1), ("max_length", 8), ("max_queue", 0), ("port", 0), ("prefill_chunk", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise InputError(f"--{name} must be at least {least}, not {value}")
    check_speculation("--speculate", arguments.speculate)
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
