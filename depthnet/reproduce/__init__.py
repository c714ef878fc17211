"""The paper's claims as studies: each a run on real data, a picture, a table and verdicts."""
