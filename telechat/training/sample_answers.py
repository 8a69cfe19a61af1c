"""Answers of a model in training to a few questions, so that one sees it learn."""

import os

from telechat.adapters.attached import AdapterInTraining, Attachment
from telechat.data.encoding import IGNORED
from telechat.generation.generator import Generator
from telechat.generation.sampling import SamplingParams
from telechat.progress import track
from telechat.training.step_log import StepLog

QUESTIONS = 3
LONGEST_ANSWER = 64  # tokens
LONGEST_PROMPT = 512


class SampleAnswers:
    """Greedy answers, kept in ``answers.jsonl``.

    Args:
        output_dir (str): where that file is.
        model (TeleChat): in training; its present weights answer.
        tokenizer (Tokenizer): of the model.
        dataset (PackedDataset): the first questions of its first rows are asked.
        held_out (bool): whether that is the part held out of training.
        first_step (int): where the run resumes; later answers are dropped.
        adapter (TrainedAdapter): in training beside the model's weights; None.
    """

    def __init__(self, output_dir, model, tokenizer, dataset, held_out, first_step=0, adapter=None):
        self.adapter = adapter
        self._attachment = Attachment(model)
        self.tokenizer = tokenizer
        self.held_out = held_out
        self.prompts = first_prompts(dataset)
        self.stop_ids = (dataset.info["settings"]["tokens"]["end"]["id"],)
        length = min(LONGEST_PROMPT + LONGEST_ANSWER, model.config.training_seqlen)
        self.prompts = [prompt for prompt in self.prompts if len(prompt) < length]
        self.excluded_ids = tokenizer.missing_ids(model.config.vocab_size)
        self._generator = Generator(model, length, batch_size=1)
        self._log = StepLog(os.path.join(output_dir, "answers.jsonl"), first_step)
        self.answers = self._log.records

    def ask(self, step):
        """Let the model answer after step ``step``."""
        if self.adapter is not None:
            self._attachment.put(AdapterInTraining(self.adapter))
        try:
            self._ask(step)
        finally:
            self._attachment.take_away()

    def _ask(self, step):
        params = SamplingParams(LONGEST_ANSWER, stop_ids=self.stop_ids, excluded_ids=self.excluded_ids)
        answers = self._generator.answers(self.prompts, params)
        for index, ids, error in track(answers, "sample answers", "questions", len(self.prompts)):
            question = self.tokenizer.decode(self.prompts[index], skip_control_tokens=True).strip()
            answer = self.tokenizer.decode(ids, skip_control_tokens=True)
            # A model that has gone astray is no reason to end its training.
            self._log.add({"step": step, "question": question,
                           "answer": answer if error is None else f"{answer} [{error}]"})


def first_prompts(dataset):
    """Up to `QUESTIONS` prompts (lists of ids): the first question of a row, the tokens around it included."""
    pad = dataset.info["settings"]["tokens"]["pad"]["id"]
    prompts = []
    for ids, labels, *_ in dataset.evaluation_batches():
        for row, wanted in zip(ids.tolist(), labels.tolist()):
            first = next((place for place, token in enumerate(row) if token != pad), len(row))
            end = next((place for place, label in enumerate(wanted) if label != IGNORED), first)
            prompt = row[first:end]
            if 0 < len(prompt) <= LONGEST_PROMPT and prompt not in prompts:
                prompts.append(prompt)
            if len(prompts) == QUESTIONS:
                return prompts
    return prompts
