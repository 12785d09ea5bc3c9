"""An HTTP server with the interfaces of OpenAI and Anthropic, for one model on one machine.

Needs the extra ``server``: ``pip install 'nanobraid[server]'``.
"""
