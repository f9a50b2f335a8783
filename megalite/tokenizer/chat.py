"""A user's message as the text that a chat model was trained to answer, by transformers."""

from typing import Any

from tokenizers import Tokenizer as Backend

from megalite.tokenizer.config_file import token_text
from megalite.tokenizer.error import TokenizerError


def render_chat(name: str, backend: Backend, config: dict[str, Any], message: str) -> str:
    """The message within the chat template of a tokenizer, up to where the answer begins.

    config: special tokens and `chat_template`, as in tokenizer_config.json.
    Raises TokenizerError, with the tokenizer's name, when the template does not take such a message.
    """
    from jinja2 import TemplateError  # slow to import, as transformers is
    from transformers import PreTrainedTokenizerFast

    try:
        texts = {key: token_text(value) or value for key, value in config.items()}
        chat = PreTrainedTokenizerFast(tokenizer_object=backend, **texts)
        messages = [{"role": "user", "content": message}]
        text = chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, ImportError) as error:
        raise TokenizerError(f"{name}: its chat template cannot be used: {error}") from error
    assert isinstance(text, str)
    return text
