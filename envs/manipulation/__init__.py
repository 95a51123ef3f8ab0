"""Robot arms in MuJoCo: Fetch and PegInsert, batched."""
