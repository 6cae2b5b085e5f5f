"""Consoles of servers, for browsers: the only place besides the event stream where asyncio is spoken."""
