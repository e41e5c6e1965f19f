"""transformers itself: its Auto classes and pipelines."""

from transformers import pipeline

from pldr import load_model, load_tokenizer

PROMPT = "Once upon a time there was"


def test_pipeline(row, operator, model_folder):
    row("transformers", "pipeline: text-generation", operator)
    folder = model_folder(operator)
    (answer,) = pipeline("text-generation", model=str(folder))(PROMPT, max_new_tokens=12, do_sample=False)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    # The pipeline decodes the new tokens alone, which loses the space before the first of them.
    assert answer["generated_text"] == PROMPT + tokenizer.decode(tokens, skip_special_tokens=True)
    assert len(tokens) == 12
