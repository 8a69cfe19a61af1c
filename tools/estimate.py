"""Memory, communication and speed of a run, before there are cards: python tools/estimate.py --config …

    python tools/estimate.py --config configs/finetune_52b.yaml --cards 16 parallel.tensor=8 parallel.pipeline=2
    python tools/estimate.py --config configs/finetune_52b.yaml --cards 16 --search
    python tools/estimate.py --generation --load_checkpoint telechat-12b --batch_size 8 --max_length 2048
"""

import dataclasses
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from telechat.cli import ArgumentParser, path_argument, run  # noqa: E402
from telechat.errors import InputError  # noqa: E402
from telechat.fields import byte_size  # noqa: E402


def parse_arguments(argv):
    parser = ArgumentParser(description="Memory, communication and speed of a run, before there are cards. "
                                        "Speeds of cards and links are assumptions: give those of yours.")
    parser.add_argument("--config", type=path_argument,
                        help="YAML file of the run, as for tools/train.py")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--load_checkpoint", type=path_argument,
                       help="checkpoint directory whose config.json describes the model")
    model.add_argument("--model_config", type=path_argument, help="that config.json itself")
    parser.add_argument("--device", choices=("ascend", "cpu"),
                        help="what the run is for; default: ascend where --cards, a --card_… or --search is given, "
                             "else what this machine has")
    parser.add_argument("--cards", type=int, help="default: what the run's tensor, pipeline, data need")
    parser.add_argument("--card_memory", help="of one card; default: 64GB")
    parser.add_argument("--card_tflops", type=float, help="of one card, 16-bit products; default: 313")
    parser.add_argument("--efficiency", type=float, default=0.4, help="share of it that is reached")
    parser.add_argument("--link_gbps", type=float, default=1200.0, help="gigabits a second that a card sends")
    parser.add_argument("--node_link_gbps", type=float, default=200.0, help="to other nodes")
    parser.add_argument("--latency_us", type=float, default=20.0, help="of any collective, microseconds")
    parser.add_argument("--cards_per_node", type=int, default=8, help="cards that the faster links connect")
    parser.add_argument("--search", action="store_true", help="list meshes that fit, best predicted first")
    parser.add_argument("--generation", action="store_true",
                        help="memory of answering on --cards that share the model; without --config")
    parser.add_argument("--batch_size", type=int, default=1, help="of --generation: sequences at a time; default: 1")
    parser.add_argument("--max_length", type=int,
                        help="of --generation: tokens of each, prompt and answer; default: what the model was made for")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16",
                        help="of --generation; default: bfloat16")
    parser.add_argument("--bits", type=int, help="8 or 4: as if tools/quantize.py had quantised the model; with a lora "
                                                 "in the run, or --generation")
    parser.add_argument("--group_size", type=int, default=128, help="of --bits; default: 128")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the YAML file")
    arguments = parser.parse_intermixed_args(argv)
    about_cards = (arguments.cards, arguments.card_memory, arguments.card_tflops) != (None, None, None)
    if arguments.generation:
        if arguments.config or arguments.search or arguments.overrides:
            parser.error("--generation goes with --load_checkpoint or --model_config, and without --config, --search and key=value")
        if not (arguments.load_checkpoint or arguments.model_config):
            parser.error("--generation needs --load_checkpoint or --model_config")
    elif not arguments.config:
        parser.error("the following arguments are required: --config")
    if arguments.device is None and (about_cards or arguments.search or arguments.generation):
        arguments.device = "ascend"
    arguments.card_memory = "64GB" if arguments.card_memory is None else arguments.card_memory
    arguments.card_tflops = 313.0 if arguments.card_tflops is None else arguments.card_tflops
    return arguments


def read_hardware(arguments):
    from telechat.parallel.estimate_speed import Hardware

    for flag in ("card_tflops", "efficiency", "link_gbps", "node_link_gbps", "cards_per_node", "cards"):
        value = getattr(arguments, flag)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"--{flag} must be above 0, not {value:g}")
    if not 0 <= arguments.latency_us < float("inf"):
        raise InputError(f"--latency_us must be at least 0, not {arguments.latency_us:g}")
    if arguments.efficiency > 1:
        raise InputError(f"--efficiency is a share and must be at most 1, not {arguments.efficiency:g}")
    return Hardware(byte_size(arguments.card_memory, "--card_memory"), arguments.card_tflops * 1e12,
                    arguments.efficiency, arguments.link_gbps * 1e9 / 8, arguments.node_link_gbps * 1e9 / 8,
                    arguments.latency_us / 1e6, arguments.cards_per_node)


def read_model(arguments, config):
    from telechat.config import TeleChatConfig

    source = arguments.model_config or config.load_checkpoint
    if source is not None:
        return TeleChatConfig.from_pretrained(source, quantised=True)
    described = config.model or config.published_model
    if described is None:
        raise InputError("no model: give --model_config its config.json, or --load_checkpoint its directory")
    return TeleChatConfig.from_dict(described)


def quantised(arguments, model):
    """The model's config, with products of --bits where they are given."""
    if arguments.bits is None:
        return model
    from telechat.quantization.checkpoint import with_settings
    from telechat.quantization.quantise import check_request, check_settings

    check_settings(arguments.bits, arguments.group_size)
    check_request(model, arguments.bits, arguments.group_size)
    return with_settings(model, {"quant_method": "gptq", "bits": arguments.bits, "group_size": arguments.group_size})


def read_run(arguments):
    """RunConfig with the mesh filled in, the model and the sequence length."""
    from telechat.parallel.mesh import mesh_shape
    from telechat.training.run_config import RunConfig

    flags = {} if arguments.load_checkpoint is None else {"load_checkpoint": arguments.load_checkpoint}
    config = RunConfig.load(arguments.config, arguments.overrides, flags)
    model, length = quantised(arguments, read_model(arguments, config)), config.sequence_length
    if config.lora is None and "quantization_config" in model.extra:
        raise InputError("products of 4 or 8 bits are not trained themselves; add lora, for an adapter beside them")
    if length is None:
        raise InputError(f"{arguments.config}: sequence_length is not set; add sequence_length=2048 or what "
                         "the dataset was preprocessed with")
    if length > model.training_seqlen:
        raise InputError(f"sequence_length {length} is more than the model was made for, "
                         f"{model.training_seqlen} (training_seqlen); make it smaller")
    parallel = config.parallel
    if not arguments.search and not wants_mesh(arguments, parallel):
        cards = arguments.cards or parallel.tensor * parallel.pipeline * (parallel.data or 1)
        parallel = dataclasses.replace(parallel, data=mesh_shape(parallel, cards)[1])
    return dataclasses.replace(config, parallel=parallel), model, length


def wants_mesh(arguments, parallel):
    """Whether there are several cards and the run says nothing of how to use them."""
    return (arguments.cards or 1) > 1 and parallel == type(parallel)()


def choose_mesh(config, model, workload, hardware, cards):
    """The run on the best mesh that --search finds, else the one that needs least memory."""
    from telechat.parallel.estimate_speed import search
    from telechat.training.estimate_lines import settings

    fitting, others = search(model, cards, workload, hardware)
    if not fitting + others:
        raise InputError(f"no mesh of {cards} cards divides the model and batch_size {workload.batch_size}; "
                         "change batch_size")
    best = (fitting + others)[0]
    print("no mesh is given; this is the fastest one that fits, of those that --search lists:" if fitting else
          "no mesh is given, and none fits; this is the one that needs least:")
    print(f"  {settings(best)}\n")
    train = dataclasses.replace(config.train, micro_batches=best.micro_batches)
    return (dataclasses.replace(config, parallel=best.parallel, train=train),
            dataclasses.replace(workload, micro_batches=best.micro_batches))


def check_run(model, config, workload):
    """The refusals of tools/train.py."""
    from telechat.parallel.plan import check_batch, check_mesh

    check_mesh(model, config.parallel)
    check_batch(config.batch_size, workload.micro_batches, config.parallel.data, workload.sequence_length,
                config.parallel)


def describe_generation(arguments, hardware):
    """Lines: what each process holds at most while it answers."""
    from telechat.config import TeleChatConfig
    from telechat.generation.card_memory import cache_room, card_memory
    from telechat.generation.memory import inference_memory
    from telechat.model import as_dtype
    from telechat.nn.kernel_choice import cpu_obstacle
    from telechat.parallel.parallel_config import ParallelConfig
    from telechat.parallel.plan import check_mesh

    model = quantised(arguments, TeleChatConfig.from_pretrained(arguments.model_config or arguments.load_checkpoint, quantised=True))
    length = model.training_seqlen if arguments.max_length is None else arguments.max_length
    slots, cards = arguments.batch_size, arguments.cards or 1
    for flag, value in (("batch_size", slots), ("max_length", length)):
        if value < 1:
            raise InputError(f"--{flag} must be at least 1, not {value}")
    check_mesh(model, ParallelConfig(tensor=cards, data=1))
    if arguments.device == "cpu":
        parts = inference_memory(model, arguments.dtype, length, 1, slots, length, slots, cards, 1,
                                 operators=cpu_obstacle(as_dtype(arguments.dtype)) is None)
    else:
        parts = card_memory(model, arguments.dtype, slots, length, cards)
    where = "a CPU" if arguments.device == "cpu" else f"each of {cards} card(s)"
    lines = [f"memory      about {sum(parts.values()) / 1e9:.2f} GB, {slots} sequence(s) of {length:,} tokens in "
             f"{arguments.dtype} on {where}:", *(f"{size / 1e9:20.2f} GB  {name}" for name, size in parts.items())]
    if arguments.device == "cpu":
        return lines
    verdict = "fits" if sum(parts.values()) <= hardware.card_memory else "DOES NOT FIT"
    free = hardware.card_memory - parts["weights"]
    tokens = max(cache_room(model, arguments.dtype, slots, length, hardware.card_memory, free, cards), 0)
    return [*lines, f"  {verdict} into {hardware.card_memory / 1e9:g} GB; not counted: what a card holds before a program begins",
            f"  with a tenth kept free, as tools/serve.py does, the cache may hold {tokens:,} tokens: {tokens // length:,} "
            f"sequence(s) of {length:,}"]


def main(argv=None):
    arguments = parse_arguments(argv)
    hardware = read_hardware(arguments)
    if arguments.generation:
        print("\n".join(describe_generation(arguments, hardware)))
        return
    config, model, length = read_run(arguments)

    from telechat.nn.kernels import on_cpu
    from telechat.training.estimate_lines import (describe_memory, describe_run, describe_search, describe_speed,
                                                  describe_traffic)
    from telechat.training.memory import workload_of

    workload = workload_of(model, config, length, on_cpu() if arguments.device is None else arguments.device == "cpu")
    if arguments.search:
        parallel = config.parallel
        cards = arguments.cards or parallel.tensor * parallel.pipeline * (parallel.data or 1)
        lines = describe_search(model, cards, workload, hardware)
    else:
        if wants_mesh(arguments, config.parallel):
            config, workload = choose_mesh(config, model, workload, hardware, arguments.cards)
        check_run(model, config, workload)
        lines = [*describe_run(model, config, workload),
                 *describe_memory(model, config.parallel, workload, hardware),
                 *describe_traffic(model, config.parallel, workload),
                 *describe_speed(model, config.parallel, workload, hardware)]
    print("\n".join(lines))
    if workload.on_cpu:
        return
    print(f"assumed          {arguments.card_tflops:g} TFLOPS a card, {arguments.efficiency:.0%} of it, "
          f"{arguments.link_gbps:g} Gbit/s a card within {arguments.cards_per_node} cards, "
          f"{arguments.node_link_gbps:g} beyond, {arguments.latency_us:g} us a call; not measured")


if __name__ == "__main__":
    run(main)
