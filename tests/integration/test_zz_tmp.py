import tests.integration.test_stateful as m
def test_x(stack, template_database, simulator):
    m.run_state_machine_as_test(lambda: m.Machine(stack, template_database, simulator), settings=m.settings(m.PROFILE, max_examples=250, derandomize=False, stateful_step_count=70, print_blob=True))
