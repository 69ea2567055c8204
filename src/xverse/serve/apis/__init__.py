"""The APIs, one module each: bodies that clients send, routes, and replies in that API's form."""
