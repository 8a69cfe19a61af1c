"""What a client is told when a request is not answered."""

import json


class APIError(Exception):
    """An answer of status 4xx or 5xx in the form of OpenAI's interface.

    Args:
        status (int): of HTTP.
        message (str): one sentence for a person.
        param (str): the field of the request that is wrong, if it is one.
        code (str): a word for programs.
    """

    def __init__(self, status, message, param=None, code=None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self):
        """What is sent, a dict."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def short(value):
    """A value of a request as JSON, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:40] + "…"
