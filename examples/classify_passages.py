"""Which of six books is a passage from? The model that ships with pldr learns it from the excerpts beside it.

    python examples/classify_passages.py [--epochs 4] [--output FOLDER]

Each excerpt's first three quarters are cut into passages to train on, its last quarter into passages to be told apart.
Needs pldr[train].
"""

import argparse
import json

import torch
from transformers import Trainer, TrainingArguments, pipeline

import pldr

LENGTH = 48  # tokens of a passage


def passages(ids: list[int], stride: int) -> list[list[int]]:
    return [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH, stride)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--output", help="folder for the classifier and its tokenizer")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = pldr.load_tokenizer(pldr.STORIES)
    books = [json.loads(line) for line in pldr.HELD_OUT.read_text(encoding="utf-8").splitlines()]
    titles = [book["title"] for book in books]
    train, test = [], []
    for label, book in enumerate(books):
        ids = tokenizer(book["text"], add_special_tokens=False)["input_ids"]
        cut = len(ids) * 3 // 4
        train += [{"input_ids": passage, "labels": label} for passage in passages(ids[:cut], LENGTH // 4)]
        test += [{"input_ids": passage, "labels": label} for passage in passages(ids[cut:], LENGTH)]

    model = pldr.PldrForSequenceClassification.from_pretrained(
        pldr.STORIES, id2label=dict(enumerate(titles)), label2id={title: i for i, title in enumerate(titles)}
    )
    settings = TrainingArguments(
        "unused", num_train_epochs=arguments.epochs, per_device_train_batch_size=16, learning_rate=3e-4,
        save_strategy="no", report_to=[], logging_steps=20, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = Trainer(
        model, settings, train_dataset=train, eval_dataset=test, compute_metrics=lambda found: {
            "accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())
        },
    )  # fmt: skip
    trainer.train()
    print(f"{len(train)} passages to learn from, {len(test)} others:", trainer.evaluate())
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    print(
        classify(["The yellow diamond had been stolen in the night.", "By substance I mean that which is in itself."])
    )
    if arguments.output:
        model.save_pretrained(arguments.output)
        tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
