"""Score a checkpoint: python tools/evaluate.py --load_checkpoint DIR --task ceval|mmlu|jsonl --data DIR"""

import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from telechat.cli import ArgumentParser, path_argument, run  # noqa: E402
from telechat.errors import InputError  # noqa: E402
from telechat.interrupts import keep_interrupts  # noqa: E402


def main(argv=None):
    arguments = parse_arguments(argv)

    from telechat.config import TeleChatConfig
    from telechat.generation.settings import GenerationSettings

    # Everything that can be wrong with the input shows before the weights are read.
    config = TeleChatConfig.from_pretrained(arguments.load_checkpoint, quantised=True)
    settings = GenerationSettings.load(arguments.load_checkpoint, config)

    from telechat.adapters.named import attached_bytes
    from telechat.adapters.peft import CONFIG, Adapter
    from telechat.evaluation.forward import ROWS
    from telechat.evaluation.identity import identify
    from telechat.evaluation.multiple_choice import BENCHMARKS, letter_ids
    from telechat.evaluation.run import (Results, evaluate_choices, evaluate_perplexity, longest_prompt,
                                         read_sequences)
    from telechat.generation.memory import check_inference_memory, plan_cache
    from telechat.parallel.inference import load_for_inference
    from telechat.parallel.parallel_config import process_count

    adapter = Adapter(arguments.lora, config) if arguments.lora else None
    choices = arguments.task in BENCHMARKS
    split = arguments.split or (BENCHMARKS[arguments.task].split if choices else None)
    files = {"lines": arguments.data}
    if choices:
        letter_ids(settings.tokenizer)
        files, folders = {}, [split, "dev"] if arguments.shots else [split]
        for subject in BENCHMARKS[arguments.task].subjects(arguments.data, split):
            for folder in folders:
                BENCHMARKS[arguments.task].read(arguments.data, folder, subject)
                name = f"{folder}/{subject}_{folder}.csv"
                files[name] = os.path.join(arguments.data, name)
    elif not os.path.isfile(arguments.data):
        raise InputError(f"--data {arguments.data} is not a file; --task jsonl wants a JSONL file")
    else:
        sequences = read_sequences(arguments.data, settings, config.training_seqlen + 1, arguments.system)
    if choices:
        longest, count = longest_prompt(arguments.task, arguments.data, split, settings, arguments.shots,
                                        config.training_seqlen)
    else:
        longest, count = max(len(ids) for ids, _ in sequences.pairs), len(sequences.pairs)
    at_once, longest = max(min(arguments.batch_size, count), 1), max(longest, 1)
    plan = None
    if choices:  # one after another, and what they begin with stays in the cache
        plan = plan_cache(config, arguments.dtype, 2, longest, None, arguments.cache_memory, True, process_count())
    check_inference_memory(config, arguments.dtype, f"lower --batch_size {arguments.batch_size}", arguments.ignore_memory,
                           prompt=longest, prompts=1 if choices else at_once, logits=at_once if choices else ROWS,
                           cached=plan.tokens if choices else 0, adapters=attached_bytes(arguments.lora, config))
    if adapter is not None:
        files |= {f"lora/{name}": os.path.join(arguments.lora, name) for name in (CONFIG, adapter.file)}
    identity = identify(arguments.load_checkpoint, config, settings, files, task=arguments.task, split=split,
                        shots=arguments.shots if choices else None, dtype=arguments.dtype,
                        system=None if choices else arguments.system)
    model, world = load_for_inference(arguments.load_checkpoint, arguments.dtype, arguments.lora)
    lead = world.rank == 0
    say = (lambda line: print(line, flush=True)) if lead else (lambda line: None)
    results = Results(arguments.output_dir, identity, world)
    try:
        if choices:
            say(f"{'subject':48s} {'asked':>6s} {'right':>7s}")
            scores = evaluate_choices(arguments.task, arguments.data, split, model, settings, results, arguments.shots,
                                      arguments.batch_size, say, plan.tokens)
        else:
            scores = evaluate_perplexity(sequences, model, results, arguments.batch_size, say)
    finally:
        results.close()
    if lead:
        paths = {"checkpoint": os.path.abspath(arguments.load_checkpoint), "data_path": os.path.abspath(arguments.data)}
        write(arguments.output_dir, "scores.json", {**paths, **identity, **scores})
        if arguments.task == "ceval" and scores["accuracy"] is None:
            write(arguments.output_dir, "submission.json", submission(results))
            print(f"the file tells no answers: {arguments.output_dir}/submission.json is what cevalbenchmark.com takes")
        else:
            print(summary(scores))
        print(f"scores: {arguments.output_dir}/scores.json")
    return 0


def parse_arguments(argv):
    parser = ArgumentParser(description="Score a checkpoint in multiple choice (C-Eval, MMLU: worked examples as turns of "
                                        "a chat, the likeliest of A to D as the next token), or the perplexity of a "
                                        "JSONL file. The same command goes on where it was broken off.")
    parser.add_argument("--load_checkpoint", type=path_argument, required=True,
                        help="checkpoint directory with its tokenizer")
    parser.add_argument("--lora", type=path_argument, metavar="DIR",
                        help="LoRA adapter, as the peft package saves it, to add to the weights")
    parser.add_argument("--task", required=True, choices=("ceval", "mmlu", "jsonl"))
    parser.add_argument("--data", type=path_argument, required=True,
                        help="the benchmark's directory, with dev/, val/ and test/; or a JSONL file")
    parser.add_argument("--split", choices=("val", "test"),
                        help="val for ceval, whose test tells no answers; test for mmlu")
    parser.add_argument("--shots", type=int, default=5, help="worked examples in front of a question")
    parser.add_argument("--batch_size", type=int, default=4, help="questions or sequences at a time")
    parser.add_argument("--cache_memory", metavar="SIZE",
                        help="key-value cache in which worked examples stay from question to question, e.g. 4GB, in each "
                             "process; default: room for two of the longest prompts")
    parser.add_argument("--system", choices=("refuse", "prepend"), default="refuse",
                        help="what becomes of a system text in a JSONL file, as in tools/preprocess.py")
    parser.add_argument("--output_dir", type=path_argument, default="evaluation", help="where answers and scores go")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="of the weights in memory; bfloat16 on Ascend")
    parser.add_argument("--ignore_memory", action="store_true", help="start though memory does not seem to suffice")
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1:
        raise InputError(f"--batch_size must be at least 1, not {arguments.batch_size}")
    if arguments.cache_memory is not None and arguments.task == "jsonl":
        raise InputError("--cache_memory goes with --task ceval and mmlu: --task jsonl uses no cache")
    if not 0 <= arguments.shots <= 100:
        raise InputError(f"--shots must be from 0 to 100, not {arguments.shots}")
    return arguments


def summary(scores):
    """The last line of the table."""
    if "perplexity" in scores:
        return (f"loss {scores['loss']:.4f}, perplexity {scores['perplexity']:.3f} over {scores['tokens']:,} tokens of "
                f"{scores['sequences']:,} sequences ({scores['cut']} cut off)")
    if scores["accuracy"] is None:
        return "the files tell no answers"
    return (f"{'mean over subjects':48s} {'':6s} {scores['accuracy']:7.1%}\n"
            f"{'all questions':48s} {'':6s} {scores['accuracy_of_questions']:7.1%}")


def submission(results):
    """C-Eval's form: subject → id → letter."""
    answers = {}
    for key, record in results.records.items():
        subject, _, number = key.rpartition("/")
        answers.setdefault(subject, {})[number] = record["answer"]
    return answers


def write(directory, name, value):
    """Write JSON that is never half there."""
    path = os.path.join(directory, name)
    with open(path + ".partial", "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
    os.replace(path + ".partial", path)


if __name__ == "__main__":
    keep_interrupts()
    run(main)
