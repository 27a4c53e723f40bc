"""Resolve, build, open and check runs. Importing this package registers the resolvers of conf/."""

from src.config import resolvers as resolvers
