"""A whole training run: data, steps, evaluation, checkpoints, and how it ends."""

import contextlib
import dataclasses
import math
import os
import time

import yaml

from telechat.checkpoint.safetensors_files import weight_digests
from telechat.data.model_template import check_generation
from telechat.data.packed_dataset import PackedDataset
from telechat.data.tokenizer import Tokenizer
from telechat.errors import InputError
from telechat.lost_output import drop_lost_output
from telechat.model import as_dtype
from telechat.nn.kernel_choice import choose_kernels
from telechat.parallel.collective_errors import run_on_all
from telechat.parallel.collectives import barrier, gather_objects
from telechat.parallel.mesh import Mesh
from telechat.parallel.plan import check_batch, check_mesh
from telechat.parallel.rendezvous import scheduler_address
from telechat.parallel.stage import Stage
from telechat.progress import Progress, duration, track
from telechat.training.description import describe_run
from telechat.training.lora_run import build_adapter, check_kind, resolve_lora
from telechat.training.profile import StepProfiler
from telechat.training.report import Report, SilentReport
from telechat.training.resources import check_resources
from telechat.training.resume import find_checkpoint, set_later_aside
from telechat.training.run_identity import check_agreement
from telechat.training.run_model import build_model, read_model_config
from telechat.training.sample_answers import SampleAnswers
from telechat.training.signals import StopSignal
from telechat.training.tensorboard_log import TensorBoardLog, check_installed
from telechat.training.time_left import TimeLeft
from telechat.training.trainer import Trainer
from telechat.training.training_state import restore, save_training_checkpoint
from telechat.version import code_version


class Diverged(RuntimeError):
    """Losses or gradients were not finite for too many steps in a row."""


class TrainingRun:
    """Everything that a `RunConfig` names, opened and checked before anything is written.

    Args:
        config (RunConfig): the run.
        resume (bool): go on from the newest checkpoint in ``output_dir`` that is whole.
        resume_from (str): a checkpoint to go on from; later ones in ``output_dir`` are set aside.
        profile (int): how many steps to profile; None for none.
        ignore_memory (bool): start though main memory or the disk do not seem to suffice.
        report (bool): write ``report.html``, with answers to a few questions at each checkpoint.
        tensorboard (bool): write TensorBoard event files.

    Raises:
        InputError: data, checkpoint and configuration do not fit together.
    """

    def __init__(self, config, resume=False, report=False, tensorboard=False, profile=None, ignore_memory=False,
                 resume_from=None):
        self.report, self.tensorboard, self.ignore_memory = report, tensorboard, ignore_memory
        if tensorboard:
            check_installed()
        if config.train_dataset is None:
            raise InputError("train_dataset is not set; give --train_dataset a directory written by tools/preprocess.py")
        self.mesh = Mesh.create(config.parallel)
        self.checkpoint = run_on_all(lambda: find_checkpoint(config.output_dir, resume, resume_from,
                                                             warn=self.mesh.world.rank == 0), self.mesh.world)
        run_on_all(lambda: self._open(config), self.mesh.world)
        mine = self._identity()
        first = gather_objects(mine, self.mesh.world)[0]
        run_on_all(lambda: check_agreement(mine, first, self.mesh.world.rank), self.mesh.world)
        self.profiler = None if profile is None else StepProfiler(config.output_dir, profile)

    def _open(self, config):
        self.dataset = PackedDataset(config.train_dataset, config.batch_size, seed=config.train.seed,
                                     segment_ids=config.train.document_mask)
        self.config = self._with_total_steps(config)
        # What the model is read from; a checkpoint of an adapter has none of its own.
        self.source = config.load_checkpoint if config.lora or config.load_lora else self.checkpoint or config.load_checkpoint
        self.model_config = read_model_config(config, self.source)
        self.lora = resolve_lora(config, self.model_config)
        check_kind(self.checkpoint, self.lora)
        self.kernels = choose_kernels(self.model_config, as_dtype(config.train.dtype), config.train.kernels,
                                      config.train.use_flash_attention)
        self.kernels.require_device()
        self._check_data()
        self._check_mesh()
        check_resources(self)
        self.tokenizer = self._tokenizer()
        if self.tokenizer is not None:
            check_generation(self.tokenizer, self.model_config)
            self.dataset.check_tokenizer(self.tokenizer)

    def _check_data(self):
        length, limit = self.dataset.max_length, self.model_config.training_seqlen
        self.dataset.check_fits(self.model_config.vocab_size, self.config.sequence_length or length)
        if length > limit:
            raise InputError(f"{self.config.train_dataset} holds sequences of {length} tokens, the model was made "
                             f"for {limit} (training_seqlen); preprocess with a smaller --max_length")
        self.evaluation = None
        if self.dataset.info["eval"] is not None:
            self.evaluation = PackedDataset(self.config.train_dataset,
                                            self.config.batch_size, split="eval",
                                            segment_ids=self.config.train.document_mask)

    def _check_mesh(self):
        config, mesh = self.config, self.mesh
        check_mesh(self.model_config, config.parallel, mesh.world.size)
        check_batch(config.batch_size, config.train.micro_batches, mesh.data.size, self.dataset.max_length,
                    config.parallel)

    def _identity(self):
        """What must be the same on all processes."""
        return {"configuration": self.config.to_dict(), "code version": code_version(),
                "model": self.model_config.to_dict(), "dataset": self.dataset.identity(), "checkpoint": self.checkpoint}

    def _with_total_steps(self, config):
        if config.epochs is None:
            return config
        steps = max(math.ceil(config.epochs * self.dataset.num_packs / config.batch_size), 1)
        return dataclasses.replace(config, epochs=None, train=dataclasses.replace(config.train, total_steps=steps))

    def _tokenizer(self):
        source = self.config.tokenizer or self.source
        if source is None:
            return None
        try:
            return Tokenizer.from_pretrained(source)
        except InputError:
            if self.config.tokenizer:
                raise
            return None  # a checkpoint without tokenizer files trains all the same; it just cannot chat

    def describe(self):
        """The resolved run as printable lines."""
        return describe_run(self)

    def run(self):
        """Train to the end; returns the last checkpoint's path and whether all steps were done.

        SIGINT, SIGTERM, SIGHUP and SIGUSR1 finish the running step, save, and end the run; so does the end of
        who reads the output.

        Raises:
            Diverged: too many steps in a row were not finite.
            InputError: a checkpoint cannot be written.
        """
        config = self.config
        info = {"seed": config.train.seed, "batch_size": config.batch_size, "data": self.dataset.identity()}
        if self.lora is not None:
            info.update(lora=self.lora.to_dict(), base=weight_digests(config.load_checkpoint))
        trainer = run_on_all(lambda: self._trainer(info), self.mesh.world)
        if self.checkpoint:
            self._say(f"resumed at step {trainer.step} from {self.checkpoint}")
        if self.mesh.world.rank == 0:
            os.makedirs(config.output_dir, exist_ok=True)
            for path in set_later_aside(config.output_dir, trainer.step):
                self._say(f"set aside {path}: its steps are done again")
            with open(os.path.join(config.output_dir, "run.yaml"), "w", encoding="utf-8") as file:
                yaml.safe_dump(config.to_dict(), file, sort_keys=False, allow_unicode=True)
        answers = self._answers(trainer)
        batches_held_out = 0 if self.evaluation is None else -(-self.evaluation.num_packs // config.batch_size)
        time_left = TimeLeft(config, batches_held_out, trainer.step)
        report = self._report(trainer.step, answers, time_left)
        stop = StopSignal(scheduler_address() if self.mesh.world.size > 1 else None)
        started, path, saved, first_step = time.time(), self.checkpoint, trainer.step, trainer.step
        try:
            batches = self.dataset.batches(trainer.step)
            skipped = 0
            stopping = False
            while trainer.step < config.train.total_steps and not stopping:
                batch = next(batches)
                if self.profiler:
                    self.profiler.begin_step()
                begin = time.perf_counter()
                first = trainer.step == first_step
                with Progress(f"step {trainer.step + 1}{', compiling' if first else ''}", trainer.layer_passes, "layers") as done:
                    result = trainer.train_step(*batch, each_layer=done.advance, stop=lambda: stop.received)
                tokens = batch[0].shape[0] * (batch[0].shape[1] - 1)
                report.step(trainer.step, result, tokens, time.perf_counter() - begin)
                if self.profiler:
                    self._say_lines(self.profiler.end_step())
                skipped = skipped + 1 if result.skipped else 0
                if skipped >= config.max_skipped_steps:
                    raise Diverged(f"stopped at step {trainer.step}: {skipped} steps in a row had a loss or gradient "
                                   "that is not finite; lower learning_rate or check the data, then " +
                                   (f"--resume from {path}" if path else "start again: nothing has been saved yet"))
                stopping = result.stop
                last = trainer.step == config.train.total_steps
                save = last or stopping or (config.save_steps and trainer.step % config.save_steps == 0)
                if self._evaluates(trainer.step, save):
                    with self._timed(time_left, "evaluation"):
                        batches_of_it = track(self.evaluation.evaluation_batches(), "evaluation", "batches", batches_held_out)
                        loss = trainer.evaluate(batches_of_it)
                    report.evaluation(trainer.step, loss)
                if save and answers and not stopping:
                    with self._timed(time_left, "answers"):
                        answers.ask(trainer.step)
                if save:
                    with self._timed(time_left, "save"):
                        path, saved = self._save(trainer, info, report), trainer.step
            if saved != trainer.step:
                path = self._save(trainer, info, report)
        except BrokenPipeError:  # who read the output has gone: the steps are kept all the same
            drop_lost_output()
            if saved != trainer.step and self.mesh.world.size == 1:
                self._save(trainer, info, report)
            raise
        finally:
            report.close()
            stop.restore()
            if self.profiler:
                self._say_lines(self.profiler.finish())
        finished = trainer.step >= config.train.total_steps
        if finished and path and self.mesh.world.rank == 0:
            _link(path, os.path.join(config.output_dir, "final"))
        self._say(f"{'done' if finished else 'interrupted'} at step {trainer.step}/{config.train.total_steps} "
                  f"after {duration(time.time() - started)}")
        for line in report.summary():
            self._say(line)
        # All end together: MindSpore may crash in a process that ends long after its neighbours.
        barrier(self.mesh.world)
        return path, finished

    def _say(self, text):
        if self.mesh.world.rank == 0:
            print(text, flush=True)

    def _say_lines(self, lines):
        if lines:
            self._say("\n".join(lines))

    @staticmethod
    @contextlib.contextmanager
    def _timed(time_left, what):
        begin = time.perf_counter()
        yield
        time_left.took(what, time.perf_counter() - begin)

    def _report(self, step, answers, time_left):
        if self.mesh.world.rank:
            return SilentReport()
        config = self.config
        text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True) if self.report else None
        log = TensorBoardLog(config.output_dir) if self.tensorboard else None
        return Report(config.output_dir, config.train.total_steps, step, text, log, answers, time_left)

    def _answers(self, trainer):
        """Sample answers for the report; a model cut over several processes gives none."""
        if not self.report or self.tokenizer is None or self.mesh.world.size > 1:
            return None
        dataset = self.evaluation or self.dataset
        return SampleAnswers(self.config.output_dir, trainer.model, self.tokenizer, dataset,
                             self.evaluation is not None, trainer.step, trainer.adapter)

    def _trainer(self, info):
        model = build_model(self)
        layers = model.layers if isinstance(model, Stage) else range(self.model_config.n_layer)
        trainer = Trainer(model, self.config.train, self.config.parallel, self.mesh, build_adapter(self, layers))
        if self.checkpoint:
            restore(self.checkpoint, trainer, info)
        return trainer

    def _evaluates(self, step, saving):
        if self.evaluation is None:
            return False
        return step % self.config.eval_steps == 0 if self.config.eval_steps else saving

    def _save(self, trainer, info, report):
        report.draw()
        path = save_training_checkpoint(self.config.output_dir, trainer, info,
                                        self.source, self.tokenizer,
                                        self.config.keep_checkpoints)
        self._say(f"saved {path}")
        return path


def _link(target, name):
    """Make ``name`` a relative symbolic link to its neighbour ``target``, replacing an older one."""
    partial = name + ".partial"
    if os.path.lexists(partial):
        os.remove(partial)
    os.symlink(os.path.basename(target), partial)
    os.replace(partial, name)
