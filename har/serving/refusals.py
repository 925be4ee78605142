"""Errors that MLflow's server answers with, in HTTP's own numbers, which MLflow lacks."""

from mlflow.exceptions import MlflowException


class _Refusal(MlflowException):  # type: ignore[misc]
    status: int

    def get_http_status_code(self) -> int:
        """Return HTTP's number."""
        return self.status


class TooLarge(_Refusal):
    """A request beyond a limit."""

    status = 413


class Unsupported(_Refusal):
    """A body of a type that is not read."""

    status = 415


class Busy(_Refusal):
    """A request for which the server has no place now."""

    status = 503


def refuse(message: str) -> MlflowException:
    """Build the error of a request that cannot be read."""
    return MlflowException.invalid_parameter_value(message)
