# The dashboard and the alerts. They need promtool, Prometheus, PyYAML, the Python client's packages and
# grafana-foundation-sdk.
set(python_of_dashboards "${PREFILLD_PYTHON}")
if(NOT python_of_dashboards)
  set(python_of_dashboards python3)
endif()
add_test(NAME dashboards_test
  COMMAND ${python_of_dashboards} -B ${CMAKE_CURRENT_SOURCE_DIR}/dashboards_test.py)
set_tests_properties(dashboards_test PROPERTIES LABELS unit TIMEOUT 60)
add_test(NAME dashboards_live_test
  COMMAND ${python_of_dashboards} -B ${CMAKE_CURRENT_SOURCE_DIR}/dashboards_live_test.py ${PROJECT_BINARY_DIR}/bin)
set_tests_properties(dashboards_live_test PROPERTIES LABELS integration TIMEOUT 300 PROCESSORS 2)

# Every alert, for its reason: a dozen servers in trouble of a minute and more.
add_library(prefilld_preloaded_faults MODULE alerts_preloaded_faults.c)
target_include_directories(prefilld_preloaded_faults PRIVATE ${DNNL_INCLUDE_DIR})
target_link_libraries(prefilld_preloaded_faults PRIVATE ${CMAKE_DL_LIBS})
add_test(NAME alerts_live_test
  COMMAND ${python_of_dashboards} -B ${CMAKE_CURRENT_SOURCE_DIR}/alerts_live_test.py
    ${PROJECT_BINARY_DIR}/bin $<TARGET_FILE:prefilld_preloaded_faults>)
set_tests_properties(alerts_live_test PROPERTIES LABELS slow TIMEOUT 600 PROCESSORS 2)
foreach(test dashboards_test dashboards_live_test alerts_live_test)
  prefilld_may_be_skipped(${test})
endforeach()
