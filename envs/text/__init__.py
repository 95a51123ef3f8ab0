"""Problems whose answers are texts: tasks, rules that judge, demonstrators."""
