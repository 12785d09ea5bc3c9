"""What tokenizers do, for clients and routers: ``/tokenize``, ``/detokenize`` and ``/tokenizer_info``."""

from __future__ import annotations

from typing import Any

from nanobraid.errors import NanobraidError
from nanobraid.server import errors
from nanobraid.server.conversation import checked_messages, checked_tools, prompt_field
from nanobraid.server.errors import invalid_value
from nanobraid.server.schema import DetokenizeRequest, TokenizeRequest
from nanobraid.server.service import Service

# Fields that mean something only where this is given.
_OF_PROMPT = ("add_special_tokens", "parse_special")
_OF_MESSAGES = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")


def _refuse(request: TokenizeRequest, names: tuple[str, ...], other: str) -> None:
    for name in names:
        if getattr(request, name):
            raise invalid_value(name, f"{name} is only allowed together with {other}")


async def tokenize(service: Service, request: TokenizeRequest) -> dict[str, Any]:
    """The tokens of a text or of a conversation, in vLLM's shape.

    Raises:
        ApiError: There is neither or both, or the text or conversation is not one, or a field is about the other one.
    """
    service.check_model(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise invalid_value("prompt", "give either prompt or messages")
    if request.prompt is not None:
        _refuse(request, _OF_MESSAGES, "messages")
        try:
            ids = await service.encode(
                request.prompt,
                add_special_tokens=request.add_special_tokens is not False,
                parse_special=bool(request.parse_special),
            )
        except NanobraidError as error:
            raise errors.of(error, "prompt") from None
    else:
        _refuse(request, _OF_PROMPT, "prompt")
        messages, tools = checked_messages(request.messages or []), checked_tools(request.tools)
        if not messages:
            raise invalid_value("messages", "messages must not be empty")
        options = service.chat_options(request, tools)
        try:
            ids = await service.engine.encode_chat(service.tools.messages(messages, tools), **options)
        except NanobraidError as error:
            raise errors.of(error, prompt_field(error)) from None
    texts = [service.tokenizer.token_text(token) for token in ids] if request.return_token_strs else None
    return {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids, "token_strs": texts}


def detokenize(service: Service, request: DetokenizeRequest) -> dict[str, Any]:
    """The text of tokens, control tokens included.

    Raises:
        ApiError: A token does not exist.
    """
    service.check_model(request.model)
    try:
        return {"prompt": service.tokenizer.decode(request.tokens, skip_special_tokens=False)}
    except NanobraidError as error:
        raise errors.of(error, "tokens") from None


def tokenizer_info(service: Service) -> dict[str, Any]:
    """Facts of the tokenizer under the names of ``tokenizer_config.json``."""
    tokenizer = service.tokenizer
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_ids
    return {
        "tokenizer_class": "nanobraid.Tokenizer",
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": service.max_model_len,
        "add_bos_token": tokenizer.add_bos,
        "bos_token": None if bos is None else tokenizer.token_text(bos),
        "bos_token_id": bos,
        "eos_token": tokenizer.token_text(eos[0]) if eos else None,
        "eos_token_id": eos[0] if eos else None,
        "eos_token_ids": eos,
        "pad_token": tokenizer.token_text(eos[0]) if eos else None,
        "chat_template": tokenizer.chat_template,
        "additional_special_tokens": sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.__getitem__),
    }
