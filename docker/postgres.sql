-- PostgreSQL's image runs this once, when it creates its data: MLflow gets a database and a role of
-- its own, which is no superuser.
\getenv password DATABASE_PASSWORD
CREATE ROLE mlflow LOGIN PASSWORD :'password';
CREATE DATABASE mlflow OWNER mlflow;
REVOKE ALL ON DATABASE mlflow FROM PUBLIC;
