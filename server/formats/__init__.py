"""Bytes of requests and replies: Open Inference Protocol, Arrow, JSON; nothing here knows the web framework."""
