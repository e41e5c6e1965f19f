"""TRL: supervised fine-tuning, packed and padding-free too, DPO and GRPO; whole models and adapters, three steps each."""

import copy
import itertools
import math

import pytest
import torch

for client in ("peft", "trl"):
    pytest.importorskip(client)
from datasets import Dataset
from peft import LoraConfig, PeftModel
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from helpers import assert_close
from pldr import load_model, load_tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
QUESTIONS = ["Who came to the king?", "Where is the old house?", "What did the queen say to her little son that day?"]
CHAT = [
    {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}
    for question, answer in zip(QUESTIONS, ["A poor boy.", "By the sea, near the town.", "Go home."], strict=True)
]
PAIRS = [row | {"chosen": row["completion"], "rejected": CHAT[1 - i]["completion"]} for i, row in enumerate(CHAT[:2])]


def settings(kind, tmp_path, **changes):
    """Three steps of every kind of training: on a CPU, reported to nobody, each loss in the log."""
    common = {
        "output_dir": str(tmp_path / "run"), "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
        "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False,
        "save_strategy": "no", "seed": 0,
    }  # fmt: skip
    return kind(**(common | changes))


@pytest.fixture
def chat_tokenizer(model_folder):
    """The tokenizer with a template, whose control tokens it reads in text."""
    tokenizer = load_tokenizer(model_folder("learned"))
    tokenizer.chat_template, tokenizer.split_special_tokens = TEMPLATE, False
    return tokenizer


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def check_adapter(trainer, folder, tmp_path):
    """Saved, read again and merged, an adapter gives the same logits; the merged model is one for `load_model`."""
    ids = torch.tensor([[5, 600, 70, 8, 900]])
    model = trainer.model.eval()
    with torch.no_grad():
        logits, before = model(ids).logits, load_model(folder)(ids).logits
        assert (logits - before).abs().max() > 1e-3
        trainer.save_model(str(tmp_path / "adapter"))
        read = PeftModel.from_pretrained(load_model(folder), tmp_path / "adapter").eval()
        assert_close(read(ids).logits, logits, max_error=1e-6)
        read.merge_and_unload().save_pretrained(tmp_path / "merged")
        assert_close(load_model(tmp_path / "merged")(ids).logits, logits, max_error=1e-4)


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "lora"])
def test_sft(row, operator, adapter, model_folder, chat_tokenizer, tmp_path):
    """On the answers of conversations; LoRA on what PEFT takes by itself."""
    row("trl", f"SFT on conversations: {'LoRA' if adapter else 'the whole model'}", operator)
    model = load_model(model_folder(operator))
    trainer = SFTTrainer(
        model, args=settings(SFTConfig, tmp_path, max_length=64), train_dataset=Dataset.from_list(CHAT[:2]),
        processing_class=chat_tokenizer, peft_config=LoraConfig(task_type="CAUSAL_LM") if adapter else None,
    )  # fmt: skip
    labels = trainer.train_dataset[0]["labels"]
    assert [label for label in labels if label != -100][-1] == chat_tokenizer.eos_token_id
    trainer.train()
    losses = logged(trainer)
    assert losses[2] < losses[1] < losses[0]
    if adapter:
        check_adapter(trainer, model_folder(operator), tmp_path)
    else:
        trainer.save_model(str(tmp_path / "tuned"))
        ids = torch.tensor([[5, 600, 70, 8, 900]])
        with torch.no_grad():
            assert_close(load_model(tmp_path / "tuned")(ids).logits, trainer.model.eval()(ids).logits, max_error=1e-6)


def test_sft_by_name(row, operator, model_folder, tmp_path):
    row("trl", "SFT by the model's name", operator)
    trainer = SFTTrainer(
        str(model_folder(operator)), args=settings(SFTConfig, tmp_path, max_length=64),
        train_dataset=Dataset.from_list([{"text": question} for question in QUESTIONS[:2]]),
    )  # fmt: skip
    assert trainer.model.config.operator == {"frozen": "constant"}.get(operator, operator)
    trainer.train()
    losses = logged(trainer)
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padding-free"])
def test_sft_rows_of_many(row, operator, packing, model_folder, chat_tokenizer, tmp_path):
    """The first loss is the plain one of each conversation by itself."""
    row("trl", f"SFT {'packed' if packing else 'padding-free'}", operator)
    model = load_model(model_folder(operator))
    plain = copy.deepcopy(model)
    trainer = SFTTrainer(
        model, processing_class=chat_tokenizer, train_dataset=Dataset.from_list(CHAT),
        args=settings(SFTConfig, tmp_path, packing=packing, padding_free=True, max_length=128 if packing else None,
                      per_device_train_batch_size=1 if packing else 3),
    )  # fmt: skip
    assert len(trainer.train_dataset) == (1 if packing else 3)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1
    assert (batch["position_ids"] == 0).sum() == 3
    total, cuts = 0.0, batch["cu_seq_lens_q"].tolist()
    for begin, end in itertools.pairwise(cuts):
        ids, labels = batch["input_ids"][:, begin:end], batch["labels"][:, begin:end]
        with torch.no_grad():
            total += plain(ids, labels=labels).loss.item() * (labels != -100).sum().item()
    trainer.train()
    losses = logged(trainer)
    assert losses[0] == pytest.approx(total / (batch["labels"] != -100).sum().item(), abs=2e-4)
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "lora"])
def test_dpo(row, operator, adapter, model_folder, chat_tokenizer, tmp_path):
    """Without a reference model: TRL makes one by the model's name, or leaves the adapter out."""
    row("trl", f"DPO, implicit reference: {'LoRA' if adapter else 'the whole model'}", operator)
    trainer = DPOTrainer(
        load_model(model_folder(operator)), train_dataset=Dataset.from_list(PAIRS), processing_class=chat_tokenizer,
        args=settings(DPOConfig, tmp_path, max_length=64, learning_rate=1e-3 if adapter else 1e-4),
        peft_config=LoraConfig(task_type="CAUSAL_LM") if adapter else None,
    )  # fmt: skip
    assert (trainer.ref_model is None) == adapter
    trainer.train()
    losses = logged(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # the reference is the model as it was
    assert losses[2] < losses[1] < losses[0]
    if adapter:
        check_adapter(trainer, model_folder(operator), tmp_path)


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "lora"])
def test_grpo(row, operator, adapter, model_folder, chat_tokenizer, tmp_path):
    """Answers are sampled and rewarded; the model leaves its reference with the first step, which is all that three can show."""
    row("trl", f"GRPO: {'LoRA' if adapter else 'the whole model'}", operator)

    def letters(completions, **_):
        return [float(len(answer[0]["content"])) for answer in completions]

    trainer = GRPOTrainer(
        load_model(model_folder(operator)), reward_funcs=letters, processing_class=chat_tokenizer,
        train_dataset=Dataset.from_list([{"prompt": conversation["prompt"]} for conversation in CHAT]),
        args=settings(GRPOConfig, tmp_path, num_generations=4, per_device_train_batch_size=4, max_completion_length=12,
                      beta=0.04),
        peft_config=LoraConfig(task_type="CAUSAL_LM") if adapter else None,
    )  # fmt: skip
    trainer.train()
    assert all(spread > 0 for spread in logged(trainer, "reward_std"))
    kl = logged(trainer, "kl")
    assert abs(kl[0]) < 1e-6 < min(kl[1:])
    if adapter:
        check_adapter(trainer, model_folder(operator), tmp_path)
