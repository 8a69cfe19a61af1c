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

_SHOWN = 20  # meshes that --search lists


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
        return TeleChatConfig.from_pretrained(source)
    described = config.model or config.published_model
    if described is None:
        raise InputError("no model: give --model_config its config.json, or --load_checkpoint its directory")
    return TeleChatConfig.from_dict(described)


def read_run(arguments):
    """RunConfig with the mesh filled in, the model and the sequence length."""
    from telechat.parallel.mesh import mesh_shape
    from telechat.training.run_config import RunConfig

    flags = {} if arguments.load_checkpoint is None else {"load_checkpoint": arguments.load_checkpoint}
    config = RunConfig.load(arguments.config, arguments.overrides, flags)
    model, length = read_model(arguments, config), config.sequence_length
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


def gigabytes(size):
    return f"{size / 1e9:9.3f} GB"


def describe_run(model, config, workload):
    from telechat.checkpoint.layout import parameter_shapes
    from telechat.parallel.estimate import elements
    from telechat.parallel.estimate_speed import cards_of
    from telechat.parallel.plan import stage_layers

    parallel, count = config.parallel, elements(parameter_shapes(model).values())
    layers = ", ".join(str(len(layers)) for layers in stage_layers(model, parallel))
    on = [name for name in ("sequence_parallel", "shard_optimizer", "recompute") if getattr(parallel, name)]
    mesh = [f"tensor {parallel.tensor}", f"pipeline {parallel.pipeline} (layers {layers})",
            f"data {parallel.data}"]
    tokens = config.batch_size * workload.sequence_length
    return [f"model       {count:,} parameters, {model.n_layer} layers of {model.hidden_size}, "
            f"{config.train.dtype}",
            f"mesh        {cards_of(parallel)} card(s): {', '.join(mesh + on)}",
            f"batch       {config.batch_size} sequences of {workload.sequence_length:,} = {tokens:,} tokens "
            f"a step, micro_batches {workload.micro_batches}"]


def describe_memory(model, parallel, workload, hardware):
    from telechat.parallel.estimate import activation_bytes
    from telechat.parallel.estimate_peak import stage_memory
    from telechat.training.memory import memory_lines

    stages = [stage_memory(model, parallel, workload, stage) for stage in range(parallel.pipeline)]
    peaks = [memory.peak for memory in stages]
    stage = peaks.index(max(peaks))
    memory = stages[stage]
    lines = ["", f"Memory of a rank in stage {stage}, the fullest: {memory.parameters:,} parameters, on "
                 f"{'a CPU' if workload.on_cpu else 'an Ascend card'}", *memory_lines(memory)]
    if parallel.pipeline > 1:
        lines.append("  peak of each stage: " + ", ".join(f"{peak / 1e9:.1f}" for peak in peaks) + " GB")
    lines.append("  activations with other settings:")
    for recompute in (False, True):
        for sequence in (False, True) if parallel.tensor > 1 else (False,):
            if sequence and workload.tokens(parallel) % parallel.tensor:
                continue
            other = dataclasses.replace(parallel, recompute=recompute, sequence_parallel=sequence)
            size = activation_bytes(model, other, workload, stage)
            lines.append(f"    {gigabytes(size)}  {'with' if recompute else 'without'} recompute, "
                         f"{'with' if sequence else 'without'} sequence_parallel")
    if workload.on_cpu:
        return [*lines, "  not counted: fragmentation, buffers of collectives"]
    if memory.peak <= hardware.card_memory:
        verdict = f"fits into {hardware.card_memory / 1e9:g} GB"
    else:
        verdict = f"DOES NOT FIT into {hardware.card_memory / 1e9:g} GB; try --search"
    return lines + [f"  {verdict}; not counted: what a card holds before a program begins, and the room that its operators "
                    "take to work in"]


def describe_generation(arguments, hardware):
    """Lines: what each process holds at most while it answers."""
    from telechat.config import TeleChatConfig
    from telechat.generation.card_memory import card_memory
    from telechat.generation.memory import inference_memory
    from telechat.parallel.parallel_config import ParallelConfig
    from telechat.parallel.plan import check_mesh

    model = TeleChatConfig.from_pretrained(arguments.model_config or arguments.load_checkpoint)
    length = model.training_seqlen if arguments.max_length is None else arguments.max_length
    slots, cards = arguments.batch_size, arguments.cards or 1
    for flag, value in (("batch_size", slots), ("max_length", length)):
        if value < 1:
            raise InputError(f"--{flag} must be at least 1, not {value}")
    check_mesh(model, ParallelConfig(tensor=cards, data=1))
    if arguments.device == "cpu":
        parts = inference_memory(model, arguments.dtype, length, 1, slots, length, slots, cards, 1)
    else:
        parts = card_memory(model, arguments.dtype, slots, length, cards)
    where = "a CPU" if arguments.device == "cpu" else f"each of {cards} card(s)"
    lines = [f"memory      about {sum(parts.values()) / 1e9:.2f} GB, {slots} sequence(s) of {length:,} tokens in "
             f"{arguments.dtype} on {where}:", *(f"{size / 1e9:20.2f} GB  {name}" for name, size in parts.items())]
    if arguments.device == "cpu":
        return lines
    verdict = "fits" if sum(parts.values()) <= hardware.card_memory else "DOES NOT FIT"
    return [*lines, f"  {verdict} into {hardware.card_memory / 1e9:g} GB; not counted: what a card holds before a program begins"]


def describe_traffic(model, parallel, workload):
    from telechat.parallel.estimate_speed import traffic

    stages = [traffic(model, parallel, workload, stage) for stage in range(parallel.pipeline)]
    sent = [sum(item.sent_bytes for item in items) for items in stages]
    stage = sent.index(max(sent))
    if not stages[stage]:
        return ["", "Communication: none, it is one card"]
    lines = ["", f"Communication of a rank in stage {stage} in a step",
             f"  {'purpose':34}{'operation':16}{'ranks':>12} {'calls':>8}  whole tensors   sent (ring)"]
    for item in stages[stage]:
        ranks = f"{item.group} {item.size}"
        lines.append(f"  {item.purpose:34}{item.operation:16}{ranks:>12} {item.calls:8,}   "
                     f"{gigabytes(item.tensor_bytes)}  {gigabytes(item.sent_bytes)}")
    return lines


def describe_speed(model, parallel, workload, hardware):
    from telechat.parallel.estimate_speed import predict, step_flops
    from telechat.parallel.pipeline import bubble_fraction

    flops = f"FLOPs of a step  {step_flops(model, workload):.4g}, all cards together, nothing computed twice"
    if workload.on_cpu:
        return ["", flops]
    prediction = predict(model, parallel, workload, hardware)
    return ["",
            flops,
            f"bubble           {bubble_fraction(parallel.pipeline, workload.micro_batches):.1%}",
            f"predicted        {prediction.tokens_per_second:,.0f} tokens/s a card, {prediction.seconds:.2f} "
            f"s a step, of it {prediction.communicating:.1%} communication, {prediction.waiting:.1%} waiting "
            f"for other stages; {prediction.utilization:.1%} of the cards' FLOPs"]


def describe_search(model, cards, workload, hardware):
    from telechat.parallel.estimate_speed import search
    from telechat.parallel.pipeline import bubble_fraction

    memory = f"{hardware.card_memory / 1e9:g} GB"
    fitting, others = search(model, cards, workload, hardware)
    if not fitting:
        least = f"; the least is {others[0].peak / 1e9:.1f} GB with {settings(others[0])}" if others else \
            f": none divides the model and batch_size {workload.batch_size}"
        raise InputError(f"no mesh of {cards} cards fits into {memory} a card{least}")
    lines = [f"{len(fitting)} mesh(es) of {cards} cards fit into {memory} a card, each with its fastest "
             "settings; predicted tokens/s a card, peak memory, bubble"]
    for candidate in fitting[:_SHOWN]:
        bubble = bubble_fraction(candidate.parallel.pipeline, candidate.micro_batches)
        lines.append(f"{candidate.prediction.tokens_per_second:8,.0f}  {candidate.peak / 1e9:6.1f} GB  "
                     f"{bubble:6.1%}  {settings(candidate)}")
    if others:
        lines.append(f"{len(others)} more do not fit, the smallest with {others[0].peak / 1e9:.1f} GB")
    return lines


def settings(candidate):
    """As they are given on the command line."""
    parallel = candidate.parallel
    values = [f"parallel.{name}={getattr(parallel, name)}" for name in ("tensor", "pipeline", "data")]
    values.append(f"micro_batches={candidate.micro_batches}")
    values += [f"parallel.{name}={str(getattr(parallel, name)).lower()}"
               for name in ("sequence_parallel", "shard_optimizer", "recompute")]
    return " ".join(values)


def main(argv=None):
    arguments = parse_arguments(argv)
    hardware = read_hardware(arguments)
    if arguments.generation:
        print("\n".join(describe_generation(arguments, hardware)))
        return
    config, model, length = read_run(arguments)

    from telechat.nn.kernels import on_cpu
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
