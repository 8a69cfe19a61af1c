"""Answers of a model in training to a few questions, so that one sees it learn."""

import json
import os

from telechat.data.conversation import IGNORED
from telechat.generation.generator import Generator
from telechat.generation.sampling import SamplingParams

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
    """

    def __init__(self, output_dir, model, tokenizer, dataset, held_out, first_step=0):
        self.path = os.path.join(output_dir, "answers.jsonl")
        self.tokenizer = tokenizer
        self.held_out = held_out
        self.prompts = first_prompts(dataset)
        self.stop_ids = (dataset.info["settings"]["tokens"]["end"]["id"],)
        length = min(LONGEST_PROMPT + LONGEST_ANSWER, model.config.training_seqlen)
        self.prompts = [prompt for prompt in self.prompts if len(prompt) < length]
        self._generator = Generator(model, length, batch_size=1)
        self.answers = [answer for answer in _read(self.path) if answer["step"] <= first_step] if first_step else []
        with open(self.path + ".partial", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in self.answers)
        os.replace(self.path + ".partial", self.path)

    def ask(self, step):
        """Let the model answer after step ``step``."""
        params = SamplingParams(LONGEST_ANSWER, stop_ids=self.stop_ids)
        for prompt, ids in zip(self.prompts, self._generator.generate(self.prompts, params)):
            question = self.tokenizer.decode(prompt, skip_control_tokens=True).strip()
            self.answers.append({"step": step, "question": question,
                                 "answer": self.tokenizer.decode(ids, skip_control_tokens=True)})
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.answers[-1], ensure_ascii=False) + "\n")


def first_prompts(dataset):
    """Up to `QUESTIONS` prompts (lists of ids): the first question of a row, the tokens around it included."""
    pad = dataset.info["settings"]["tokens"]["pad"]["id"]
    prompts = []
    for ids, labels in dataset.evaluation_batches():
        for row, wanted in zip(ids.tolist(), labels.tolist()):
            first = next((place for place, token in enumerate(row) if token != pad), len(row))
            end = next((place for place, label in enumerate(wanted) if label != IGNORED), first)
            prompt = row[first:end]
            if 0 < len(prompt) <= LONGEST_PROMPT and prompt not in prompts:
                prompts.append(prompt)
            if len(prompts) == QUESTIONS:
                return prompts
    return prompts


def _read(path):
    """The answers of an earlier process; a last line cut short by a crash is left out."""
    answers = []
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            for line in file:
                try:
                    answers.append(json.loads(line))
                except ValueError:
                    break
    return answers
