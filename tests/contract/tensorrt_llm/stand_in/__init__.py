"""What runs behind the documented names: a small deterministic engine that watches how it is used."""
