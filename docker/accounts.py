"""Create the account that reads models for the model server, or give it its present password.

compose.yaml runs this when MLflow answers, as the admin. The account may read all and change
nothing that others made, since the model server runs the code that a model brings. MLflow lets
every account make experiments and models of its own.
"""

import os

from mlflow.exceptions import MlflowException
from mlflow.server.auth.client import AuthServiceClient

READER = "model-server"


def main() -> None:
    """Create the account; a second call changes its password."""
    client = AuthServiceClient(os.environ["MLFLOW_TRACKING_URI"])
    password = os.environ["MODEL_SERVER_PASSWORD"]
    try:
        client.create_user(READER, password)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        client.update_user_password(READER, password)


if __name__ == "__main__":
    main()
