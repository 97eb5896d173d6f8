"""Generation under a chat contract: batched greedy answers for evaluation, and a conversation on the terminal."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TextStreamer
from transformers.utils.logging import disable_progress_bar

from posttrain.chat import ChatContract, check_contract, encode_prompt, read_contract
from posttrain.error import UserError


def stop_ids(tokenizer: PreTrainedTokenizerBase, contract: ChatContract) -> list[int]:
    """Ids of the tokens that end an answer."""
    ids: Any = tokenizer.convert_tokens_to_ids(list(contract.stop_tokens))
    return list(ids)


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of an answer's tokens, without special ones."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str), "one row of ids decodes to one text"
    return text


def answer_all(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    contract: ChatContract,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    tick: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """The greedy answer to each prompt of token ids, without its stop token; `tick` is told how many are done.

    Prompts are batched by length and padded on the left; an answer does not depend on its neighbours but for rounding.
    """
    stops = stop_ids(tokenizer, contract)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = len(prompts[batch[0]])
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, width - len(prompts[index]) :] = 1
        generated = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
        )[:, width:].tolist()
        for index, tokens in zip(batch, generated, strict=True):
            end = next((position for position, token in enumerate(tokens) if token in stops), len(tokens))
            answers[index] = decode(tokenizer, tokens[:end])
        tick(start + len(batch))
    return answers


def chat(directory: Path, *, name: str, prompt: str | None) -> None:
    """Talk to the policy in `directory` on the terminal, or put one question to it and print the answer."""
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    contract = read_contract(directory)
    if contract is None:
        raise UserError(f"{directory}: has no chat contract, so it is no policy that a stage published")
    check_contract(contract, tokenizer, str(directory))
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    if torch.cuda.is_available():
        model.to("cuda")
    messages: list[dict[str, str]] = []
    if prompt is not None:
        _reply(model, tokenizer, contract, [{"role": "user", "content": prompt}])
        return
    print(f"Talking to {name}. /new begins again, an empty line or Ctrl-D ends.")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return
        if not text:
            return
        if text == "/new":
            messages = []
            continue
        try:
            asked = [*messages, {"role": "user", "content": text}]
            messages = [*asked, {"role": "assistant", "content": _reply(model, tokenizer, contract, asked)}]
        except UserError as error:
            print(error)


def _reply(model: Any, tokenizer: PreTrainedTokenizerBase, contract: ChatContract, messages: list[dict[str, str]]) -> str:
    ids = torch.tensor([encode_prompt(tokenizer, messages, None, "chat")], device=model.device)
    room = model.config.get_text_config().max_position_embeddings - ids.shape[1]
    if room < 1:
        raise UserError(f"chat: the conversation has {ids.shape[1]} tokens, more than the model can read; begin again with /new")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    generated = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=min(room, 1024),
        do_sample=False,
        eos_token_id=stop_ids(tokenizer, contract),
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
    )
    return decode(tokenizer, generated[0, ids.shape[1] :].tolist())
