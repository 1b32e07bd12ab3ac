"""Nothing of the paper is here: what any such project needs, and may be skipped at a first reading."""
