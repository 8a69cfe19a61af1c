"""Fine-tune a TeleChat model: python tools/train.py --config configs/finetune_12b.yaml …"""

import argparse
import pathlib
import shlex
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from telechat.cli import ArgumentParser, path_argument, run  # noqa: E402


def main(argv=None):
    parser = ArgumentParser(description="Fine-tune a TeleChat model, or train one from scratch.")
    parser.add_argument("--config", type=path_argument, required=True, help="YAML file of the run")
    parser.add_argument("--train_dataset", type=path_argument, help="directory written by tools/preprocess.py")
    parser.add_argument("--load_checkpoint", type=path_argument, help="checkpoint directory to start from")
    parser.add_argument("--lora", type=path_argument, metavar="DIR",
                        help="LoRA adapter to train further, as this tool or the peft package saved it")
    parser.add_argument("--output_dir", type=path_argument, help="where checkpoints, metrics and curves go")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in output_dir that is whole")
    parser.add_argument("--resume_from", type=path_argument, metavar="CHECKPOINT",
                        help="go on from this one; later ones in output_dir are set aside")
    parser.add_argument("--profile", type=int, metavar="STEPS", help="profile so many steps after the first two")
    parser.add_argument("--report", action=argparse.BooleanOptionalAction, default=True,
                        help="write report.html: curves, settings, and answers to a few questions at each checkpoint")
    parser.add_argument("--tensorboard", action="store_true", help="write event files to output_dir/tensorboard too")
    parser.add_argument("--ignore_memory", action="store_true",
                        help="start though main memory or the disk do not seem to suffice")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the YAML file")
    arguments = parser.parse_intermixed_args(argv)  # key=value may stand between flags

    # Flags win over the file, and are not parsed as YAML: a path may look like a number.
    from telechat.training.run_config import RunConfig
    flags = {name: getattr(arguments, name) for name in ("train_dataset", "load_checkpoint", "output_dir")
             if getattr(arguments, name) is not None}
    if arguments.lora is not None:
        flags["load_lora"] = arguments.lora
    config = RunConfig.load(arguments.config, arguments.overrides, flags)

    from telechat.training.run import Diverged, TrainingRun
    training = TrainingRun(config, arguments.resume, arguments.report, arguments.tensorboard, arguments.profile,
                           arguments.ignore_memory, arguments.resume_from)
    lead = training.mesh.world.rank == 0
    if training.mesh.world.size > 1:
        print(training.mesh.describe(), flush=True)
    if lead:
        print("\n".join(training.describe()), flush=True)
    try:
        path, finished = training.run()
    except Diverged as error:
        if lead:
            print(f"error: {error}", file=sys.stderr)
        return 1
    if not lead:
        return 0
    print(f"checkpoint: {path}\nmetrics:    {config.output_dir}/metrics.jsonl\ncurves:     {config.output_dir}/loss.png")
    if arguments.report:
        print(f"report:     {config.output_dir}/report.html")
    if finished:
        final = f"--load_checkpoint {shlex.quote(f'{config.output_dir}/final')}"
        if training.lora is not None:
            final = f"--load_checkpoint {shlex.quote(config.load_checkpoint)} --lora {shlex.quote(f'{config.output_dir}/final')}"
        print(f"next:       python tools/generate.py {final}\nin browser: python tools/serve.py {final}")
    else:
        print("next:       the same command with --resume")
    return 0


if __name__ == "__main__":
    run(main)
